"""The report is self-contained and escaped, needs no script, and shows the recorded figures."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages.checkout.artifacts import file_digest, write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.pages import report
from stages.pages.verdict import verdict
from tests.stages.tiny_run import tiny_params, write_tiny_run

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "link", "br", "input", "rect", "line", "circle", "polyline"}


def answer(text: str, right: float) -> dict[str, object]:
    return {"text": text, "stopped": True, "num_tokens": 3, "scores": {"exact_match": right}}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = write_tiny_run(tmp_path_factory.mktemp("report"))
    figures = {"loss": 1.0, "size_mb": 538.0, "exact_match": 0.0}
    results = {
        "figures": ["exact_match"],
        "num_prompts": 2,
        "num_general": 0,
        "num_test": 0,
        "lm_eval": {},
        "max_new_tokens": 8,
        "models": {
            "base": figures,
            "tuned": {**figures, "loss": 0.1, "exact_match": 0.5},
            "merged": {"loss": 0.1, "size_mb": 538.0},
            "quantized": {"loss": 0.11, "size_mb": 114.6, "exact_match": 0.5, "custom": 0.25},
        },
        "intervals": {"tuned": {"exact_match": [0.4, 0.6]}},
        "comparisons": [
            {
                "before": "base",
                "after": "tuned",
                "figures": {
                    "loss": {"difference": -0.9, "interval": [-1.0, -0.8], "p_value": 0.0001, "test": "permutation"},
                    "exact_match": {"difference": 0.5, "interval": [-0.1, 0.9], "p_value": 0.25, "test": "McNemar"},
                    "custom": {"difference": 0.25, "interval": [0.1, 0.4], "p_value": 0.01, "test": "permutation"},
                },
            }
        ],
        "not_generated": {"merged": "not generated"},
        "gate": [
            {
                "condition": f"tuned.loss <= {EVIL}",
                "left": 0.1,
                "right": 1.0,
                "passed": True,
                "reason": "0.1 <= 1",
                "verdict": "shown",
            }
        ],
        "passed": True,
    }
    write_json(paths.out("evaluate", "results.json"), results)
    rows = [
        {
            "prompt": f"shared\n{EVIL}",
            "reference": "a b c",
            "answers": {"tuned": answer("a b c", 1.0), "quantized": answer("a b x", 0.0)},
        },
        {
            "prompt": "shared\nother",
            "reference": "a b c",
            "answers": {"tuned": answer("a b d", 0.0), "quantized": answer("a b d", 0.0)},
        },
    ]
    write_jsonl(paths.out("evaluate", "generations.jsonl"), [{"id": f"x:{n}", **row} for n, row in enumerate(rows)])
    modules = [
        {"layer": layer, "module": name, "loss": 0.1, "relative_error": 0.1 + layer, "damp": 0.05}
        for layer in (0, 1)
        for name in ("mlp.up_proj", "self_attn.q_proj")
    ]
    settings = {"bits": 4, "group_size": 64}
    sizes = {
        "num_rows": 32,
        "num_distinct_rows": 32,
        "num_tokens": 8192,
        "source_bytes": 538e6,
        "quantized_bytes": 114.6e6,
    }
    rest = {"mean_relative_error": 0.6, "num_damping_retries": 1}
    write_json(
        paths.out("quantize", "report.json"),
        {"method": "gptq", "settings": settings, "modules": modules, **sizes, **rest},
    )
    report.write_evaluation_page(tiny_params(), paths)
    return paths


@pytest.fixture(scope="module")
def page(paths: Paths) -> str:
    return paths.evaluation_page.read_text(encoding="utf-8").replace(report.NBSP, " ")


class Structure(HTMLParser):
    """Checks that elements close in order and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [
            (tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_page_is_well_formed_loads_nothing_and_runs_nothing(page: str) -> None:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert all(tag == "a" and value.startswith("#") for tag, value in structure.loads)
    assert "script" not in structure.tags
    assert not re.search(r"url\(|@import|https?://", page)


def test_what_comes_from_data_and_params_is_escaped(page: str) -> None:
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # condition, first line of the prompt, prompt


def test_verdict_comes_first_with_its_figures(page: str) -> None:
    header = page[page.index("<h1>") : page.index("</header>")]
    assert "The gate is open: its condition holds; only 2 held-out rows" in header
    assert "Exact match on 2 held-out rows: base 0 %, tuned 50 %, quantized 50 %." in header
    assert "21.3 % of the merged one&#39;s size" in header


def test_table_has_a_cell_a_model_an_interval_and_unknown_metrics_too() -> None:
    results = {
        "models": {"base": {"loss": 2.0}, "tuned": {"loss": 0.5, "custom": 0.25}},
        "intervals": {"tuned": {"loss": [0.4, 0.6]}},
    }
    assert report.comparison(results) == [
        {
            "label": "Loss (nats per token)",
            "better": "less",
            "cells": [
                {"text": "2.000", "interval": "", "mark": ""},
                {"text": "0.500", "interval": "0.400–0.600", "mark": "better"},
            ],
        },
        {
            "label": "custom",
            "better": "",
            "cells": [
                {"text": "–", "interval": "", "mark": ""},
                {"text": "0.250", "interval": "", "mark": ""},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("tuned", "mark"),
    [([0.9, 0.97], "better"), ([0.7, 0.9], ""), ([0.1, 0.3], "worse")],
    ids=["apart", "overlapping", "below"],
)
def test_figure_is_bold_only_if_its_interval_lies_above_the_one_of_the_base(tuned: list[float], mark: str) -> None:
    models = {"base": {"exact_match": 0.6}, "tuned": {"exact_match": sum(tuned) / 2}}
    intervals = {"base": {"exact_match": [0.5, 0.8]}, "tuned": {"exact_match": tuned}}
    (row,) = report.comparison({"models": models, "intervals": intervals})
    assert [cell["mark"] for cell in row["cells"]] == ["", mark]


def test_answers_are_folded_in_pages_of_twenty(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "prompt": f"question {n}", "reference": "a", "answers": {"tuned": answer("a", 1.0)}}
        for n in range(45)
    ]
    write_jsonl(tmp_path / "generations.jsonl", rows)
    (group,) = report.read_answers(tmp_path / "generations.jsonl")["groups"]
    assert (group["name"], group["number"]) == ("The tuned model is right", 45)
    assert [len(page) for page in group["pages"]] == [20, 20, 5]


def with_results(paths: Paths, **changes: object) -> dict[str, object]:
    return {**report.read_json(paths.out("evaluate", "results.json")), **changes}


def test_headline_says_that_the_evidence_is_weak(paths: Paths) -> None:
    models = {"tuned": {"exact_match": 0.0}}
    gate = [{"verdict": "not shown"}, {"verdict": "failed"}, {"verdict": "shown"}]
    weak = verdict(with_results(paths, models=models, gate=gate[:1], passed=False, num_prompts=1))
    assert weak["headline"].replace(report.NBSP, " ") == (
        "The gate is closed: 1 of 1 conditions is not shown; only 1 held-out row; exact match is 0 %"
    )
    assert weak["tone"] == "unsure"
    both = verdict(with_results(paths, gate=gate, passed=False, num_prompts=20))
    assert both["headline"] == "The gate is closed: of 3 conditions, 1 does not hold and 1 is not shown"
    assert both["tone"] == "closed"
    lax = verdict(with_results(paths, gate=[gate[0], gate[2]], passed=True, num_prompts=20))
    assert lax["headline"] == "The gate is open, but 1 of 2 conditions is not shown"


def test_changes_have_a_sign_an_interval_and_a_p_value_and_are_marked_when_certain(paths: Paths) -> None:
    results = report.read_json(paths.out("evaluate", "results.json"))
    rows = report.changes(results["comparisons"][0])["rows"]
    texts = [tuple(row[key].replace(report.NBSP, " ") for key in ("label", "difference", "interval")) for row in rows]
    assert texts == [
        ("Exact match", "+50.0 points", "-10.0 to +90.0 points"),
        ("Loss (nats per token)", "-0.900", "-1.000 to -0.800"),
        ("custom", "+0.250", "+0.100 to +0.400"),
    ]
    assert [(row["p_value"], row["mark"]) for row in rows] == [("0.250", ""), ("< 0.001", "yes"), ("0.010", "")]
    assert "tuned against base, row by row" in paths.evaluation_page.read_text(encoding="utf-8")


def test_mistakes_come_first_and_the_shared_beginning_is_shown_once(paths: Paths) -> None:
    shown = report.read_answers(paths.out("evaluate", "generations.jsonl"))
    groups = [(group["name"], [row["id"] for page in group["pages"] for row in page]) for group in shown["groups"]]
    assert groups == [
        ("The tuned model is wrong", ["x:1"]),
        ("The quantized model answers differently than the tuned one", ["x:0"]),
    ]
    assert (shown["num_rows"], shown["num_wrong"], shown["num_changed"]) == (2, 1, 1)
    assert shown["shared"] == "shared"
    assert shown["groups"][0]["pages"][0][0]["prompt"] == "other"


def test_data_section_has_sources_and_counts_of_rows(page: str) -> None:
    assert "8 rows were read: 4 to train on, 3 held out, 1 left out." in page
    assert "3 documents of 150 tokens, 70 of them trained, packed into 2 rows that are 90 % full" in page
    assert 'title="tiny.jsonl: 5e5e' in page


def test_ledger_is_counted_by_reason_and_quantization_error_is_drawn(paths: Paths, page: str) -> None:
    assert report.ledger_summary(paths) == [
        {"stage": "load", "reason": "duplicate", "action": "left out", "count": 1, "ids": ["tiny.jsonl:5"]}
    ]
    assert page.count('class="cell"') == 4
    write_jsonl(
        paths.out("train", "stream", "ledger.jsonl"),
        [{"id": "tiny.jsonl:9", "stage": "load", "reason": "no_answer", "action": "drop"}],
    )
    assert report.ledger_summary(paths, with_stream=True)[1:] == [
        {"stage": "train, load", "reason": "no answer", "action": "left out", "count": 1, "ids": ["tiny.jsonl:9"]}
    ]
    assert len(report.ledger_summary(paths)) == 1  # `pack` knows nothing of the training
    paths.out("train", "stream", "ledger.jsonl").unlink()
    assert "1 layers needed more damping" in page
    assert "calibrated on 8,192 tokens in 32 training rows: 538 MB became 115 MB" in page


def test_page_without_quantization_and_without_gate_has_a_note(paths: Paths, tmp_path: Path) -> None:
    other = write_tiny_run(tmp_path)
    for name in ("results.json", "generations.jsonl"):
        other.out("evaluate", name).parent.mkdir(exist_ok=True)
        other.out("evaluate", name).write_bytes(paths.out("evaluate", name).read_bytes())
    results = report.read_json(other.out("evaluate", "results.json"))
    del results["models"]["quantized"]
    write_json(other.out("evaluate", "results.json"), {**results, "gate": []})
    report.write_evaluation_page(tiny_params(), other)
    page = other.evaluation_page.read_text(encoding="utf-8")
    assert "Measured without a gate" in page
    assert "not quantized in this test" in page


def test_throughput_is_drawn_for_the_training_that_was_timed_and_for_no_other(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    timed = {"curve_sha256": file_digest(paths.out("train", "curve.csv")), "throughput": [[2, 100.0], [3, 250.0]]}
    write_json(paths.timings("train"), timed)
    assert "Tokens per second" in report.curves(paths)[-1]
    assert "250" in report.curves(paths)[-1]
    write_json(paths.timings("train"), {**timed, "curve_sha256": "another training"})
    assert not any("Tokens per second" in chart for chart in report.curves(paths))


def test_the_shipped_step_and_the_last_one_are_named(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    evaluations = [{"step": 4, "value": 1.25}, {"step": 8, "value": 1.5}]
    chosen = {"metric": "eval_loss", "higher_is_better": False, "step": 4, "value": 1.25, "last_step": 8}
    record = {**chosen, "last_value": 1.5, "stopped_early": True, "max_steps": 12, "evaluations": evaluations}
    write_json(paths.out("train", "selection.json"), record)
    assert report.selection(paths) == (
        "Training stopped early after step 8 of 12. Shipped: step 4 (eval_loss 1.250, the lowest of 2 evaluations). "
        "The last step was 8 (eval_loss 1.500)."
    )
    write_json(paths.out("train", "selection.json"), {**record, "step": 8, "value": 1.5, "stopped_early": False})
    assert report.selection(paths) == "Shipped: the last step, 8 (eval_loss 1.500, the lowest of 2 evaluations)."


def test_answers_while_it_trained_are_side_by_side_without_secrets(paths: Paths, tmp_path: Path) -> None:
    other = write_tiny_run(tmp_path)
    assert report.samples_section(tiny_params(), other) is None
    texts = [(0, "no"), (4, EVIL), (8, EVIL)]
    answers = [
        {"step": step, "text": text, "stopped": step > 0, "scores": {"exact_match": 0.0}} for step, text in texts
    ]
    row = {"id": "a:1", "prompt": "Key hf_AbCdEfGhIjKlMnOpQrStUvWx1234567890", "reference": "yes", "answers": answers}
    write_jsonl(other.out("train", "samples.jsonl"), [row])
    section = report.samples_section(tiny_params(), other)
    assert section is not None
    assert "<span>steps 4 to 8</span>" in section.body
    assert "did not stop" in section.body
    assert "AbCdEfGhIjKl" not in section.body
    assert "<script>" not in section.body


def test_untrained_modules_and_a_loss_that_stood_still_are_shown(paths: Paths, tmp_path: Path) -> None:
    other = write_tiny_run(tmp_path)
    found = {"step": 5, "modules": "layers.*.mlp", "count": 3, "first": "layers.0.mlp", "problem": "no gradient"}
    flat = {"sentence": "The held-out loss stays between 2.0000 and 2.0010 from step 4 to 8."}
    write_json(other.out("train", "effect.json"), {"untrained": [found], "flat_loss": flat})
    section = report.training_section(tiny_params(), other)
    assert '<td>layers.*.mlp</td><td class="num">3</td><td>no gradient</td>' in section.body
    assert "Training has changed little. The held-out loss stays between 2.0000" in section.body
    assert "to be trained and are not" not in paths.evaluation_page.read_text(encoding="utf-8")


def test_bad_updates_and_code_that_came_with_the_model_are_shown(paths: Paths, tmp_path: Path) -> None:
    other = write_tiny_run(tmp_path)
    for name in ("results.json", "generations.jsonl"):
        other.out("evaluate", name).parent.mkdir(exist_ok=True)
        other.out("evaluate", name).write_bytes(paths.out("evaluate", name).read_bytes())
    row = {"step": 7, "bad_update": "gradient norm nan", "action": "skipped"}
    write_jsonl(other.out("train", "bad_updates.jsonl"), [row])
    report.write_evaluation_page(tiny_params(model={"trust_remote_code": True}), other)
    page = other.evaluation_page.read_text(encoding="utf-8")
    assert "Updates with an invalid or spiking loss or gradient: 1" in page
    assert "<td>gradient norm nan</td><td>skipped</td>" in page
    assert "Python code that comes with the model was run" in page
    quiet = paths.evaluation_page.read_text(encoding="utf-8")
    assert "invalid or spiking" not in quiet
    assert "that comes with the model was run" not in quiet


def test_divergence_that_is_none_by_construction_is_no_best() -> None:
    models = {"base": {"kl": 3.0}, "tuned": {}, "merged": {"kl": 0.0}, "quantized": {"kl": 0.1, "regression_kl": 0.2}}
    rows = report.comparison({"models": models, "intervals": {}})
    assert next(row["label"] for row in rows) == "KL from the tuned model (nats per token)"
    assert not any(cell["mark"] for row in rows for cell in row["cells"])


def test_page_describes_the_promotion(page: str) -> None:
    section = page.split('id="promotion"')[1].split("</section>")[0]
    assert "The gate is open." in section
    assert "<code>champion</code> moves too, unless a condition of <code>publish.gate</code> is not met" in section
    assert "outs/publish/promotion.html" in section


def test_shares_of_trained_weights_are_shown(paths: Paths, tmp_path: Path) -> None:
    other = write_tiny_run(tmp_path)
    for name in ("results.json", "generations.jsonl"):
        other.out("evaluate", name).parent.mkdir(exist_ok=True)
        other.out("evaluate", name).write_bytes(paths.out("evaluate", name).read_bytes())
    shares = {
        "experts": {"weights": 12000, "reached": 9000, "trained": 480},
        "router": {"weights": 64, "reached": 0, "trained": 0},
        "prompt": {"weights": 0, "reached": 0, "trained": 24},
    }
    write_json(other.out("train", "weights.json"), shares)
    report.write_evaluation_page(tiny_params(), other)
    page = other.evaluation_page.read_text(encoding="utf-8")
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["experts", "12,000", "75\u00a0%", "480"] in cells
    assert ["router", "64", "0\u00a0%", "0"] in cells
    assert ["prompt", "0", "–", "24"] in cells
    assert "Weights that training changes" not in paths.evaluation_page.read_text(encoding="utf-8")
