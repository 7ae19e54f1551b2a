"""General prompts: read from tasks/, measured in addition to the held-out rows, open to gates, shown in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.checkout.artifacts import read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.evaluation.rows import read_records
from stages.pages.forgotten import forgotten
from stages.params.figures import metric_names
from stages.params.schema import RegressionSection, load_params
from stages.tools.check import check_later_stages
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

ROWS = [{"question": "What is the capital of France?", "answer": "Paris"}, {"question": "2?", "answer": "two"}]
TEST_ROWS = [{"question": "Never seen?", "answer": "{}"}, {"question": "Nor this?", "answer": "[1]"}]
GENERAL = {"path": "tasks/general.jsonl", "task": "text", "max_new_tokens": 3}
GATE = ["tuned.regression_loss <= 10 * base.regression_loss", "tuned.regression_exact_match >= 0.5"]


def write_rows(root: Path, rows: list[dict[str, Any]], name: str = "general.jsonl") -> None:
    (root / "tasks").mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (root / "tasks" / name).write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, str]:
    paths = write_tiny_run(tmp_path_factory.mktemp("regression"))
    write_rows(paths.root, ROWS)
    write_rows(paths.root, TEST_ROWS, "test.jsonl")
    evaluate.run(tiny_params(evaluate={"regression": GENERAL, "gate": GATE, "test": "tasks/test.jsonl"}), paths)
    return paths, paths.evaluation_page.read_text(encoding="utf-8")


def test_every_model_has_figures_on_general_prompts_and_on_held_out_rows(finished: tuple[Paths, str]) -> None:
    results = read_json(finished[0].out("evaluate", "results.json"))
    found = {f"{m}.{name}" for m, figures in results["models"].items() for name in figures}
    section = tiny_params(evaluate={"regression": GENERAL, "test": "tasks/test.jsonl"}).evaluate
    assert found == metric_names(section, with_quantized=False)
    assert {name for name in found if "regression_" in name and name.startswith("tuned")} == {
        "tuned.regression_loss",
        "tuned.regression_exact_match",
        "tuned.regression_word_f1",
        "tuned.regression_stop_rate",
    }
    base, tuned, merged = (results["models"][name] for name in ("base", "tuned", "merged"))
    assert merged["regression_loss"] == pytest.approx(tuned["regression_loss"], rel=1e-5)
    assert tuned["regression_loss"] != pytest.approx(tuned["loss"], rel=1e-5)
    assert base["regression_kl"] > 1e-4 > 1e-8 > abs(merged["regression_kl"])
    assert read_json(finished[0].metrics("evaluate"))["base"]["regression_loss"] == base["regression_loss"]


def test_general_prompts_have_intervals_paired_tests_and_conditions(finished: tuple[Paths, str]) -> None:
    results = read_json(finished[0].out("evaluate", "results.json"))
    low, high = results["intervals"]["tuned"]["regression_loss"]
    assert low <= results["models"]["tuned"]["regression_loss"] <= high
    test = results["comparisons"][0]["figures"]["regression_loss"]
    models = results["models"]
    difference = models["tuned"]["regression_loss"] - models["base"]["regression_loss"]
    assert test["difference"] == pytest.approx(difference, abs=1e-5)
    assert [row["passed"] for row in results["gate"]] == [True, False]


def test_test_rows_have_the_figures_of_the_held_out_rows_and_no_page_shows_their_answers(
    finished: tuple[Paths, str],
) -> None:
    paths, page = finished
    results = read_json(paths.out("evaluate", "results.json"))
    tuned, names = results["models"]["tuned"], ["exact_match", "json_valid", "field_f1", "loss", "stop_rate"]
    assert results["num_test"] == 2
    assert {f"test_{name}" for name in names} <= tuned.keys()
    assert tuned["test_loss"] not in (tuned["loss"], tuned["regression_loss"])
    assert "test_exact_match" in results["comparisons"][0]["figures"]
    assert [row["id"] for row in read_jsonl(paths.out("evaluate", "test.jsonl"))] == ["test.jsonl:1", "test.jsonl:2"]
    documents = list(read_jsonl(paths.out("evaluate", "documents.jsonl")))
    assert sum(row.get("test", False) for row in documents) == 2
    assert "Test rows: exact match" in page
    assert "Never seen?" not in page


def test_what_was_forgotten_is_shown_worst_first() -> None:
    def row(prompt: str, before: float, after: float) -> dict[str, Any]:
        answers = {
            name: {"text": f"{name} to {prompt}", "scores": {"exact_match": 0.0, "word_f1": score}}
            for name, score in (("base", before), ("tuned", after))
        }
        return {"prompt": f"<user>\n{prompt}\n</user>", "reference": "Yes.", "answers": answers}

    found = forgotten([row("kept", 0.5, 0.5), row("lost", 1.0, 0.0), row("gained", 0.0, 0.5), row("worse", 0.5, 0.25)])
    assert found is not None
    assert [shown["prompt"] for shown in found["rows"]] == ["lost", "worse", "kept", "gained"]
    assert found["rows"][0]["before"] == "base to lost"
    assert found["label"] == "Word F1"
    assert (found["num_worse"], found["num_same"], found["num_better"]) == (2, 1, 1)
    assert forgotten([]) is None


def test_answers_to_general_prompts_are_kept_and_shown(finished: tuple[Paths, str]) -> None:
    paths, page = finished
    rows = list(read_jsonl(paths.out("evaluate", "general.jsonl")))
    assert [(row["id"], row["reference"]) for row in rows] == [("general.jsonl:1", "Paris"), ("general.jsonl:2", "two")]
    assert set(rows[0]["answers"]) == {"base", "tuned"}
    assert "General prompts: loss (nats per token)" in page
    assert "General prompts: 2 rows that have nothing to do with the training data" in page
    assert "What is the capital of France?" in page[page.index('<details id="general">') :]


def test_losses_alone_when_there_is_no_task_and_old_answers_go(finished: tuple[Paths, str]) -> None:
    paths = finished[0]
    evaluate.run(tiny_params(evaluate={"regression": {**GENERAL, "task": None}, "gate": []}), paths)
    tuned = read_json(paths.out("evaluate", "results.json"))["models"]["tuned"]
    assert [name for name in tuned if name.startswith("regression_")] == ["regression_loss"]
    assert not paths.out("evaluate", "general.jsonl").exists()
    assert '<details id="general">' not in paths.evaluation_page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "columns .* are none of"),
        ([{"question": "2?", "answer": ""}], r"regression.path: general.jsonl:1: "),
        ([*ROWS, {"question": "2?"}], r"general.jsonl:3: no value in \['answer'\]"),
    ],
)
def test_rows_that_make_no_sense_are_named(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    write_rows(tmp_path, rows)
    with pytest.raises(ValueError, match=words):
        read_records(RegressionSection(**GENERAL), tmp_path)


def test_file_elsewhere_and_file_that_is_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must lie in tasks/"):
        tiny_params(evaluate={"regression": {**GENERAL, "path": "data/general.jsonl"}})
    (tmp_path / "tasks").mkdir()
    with pytest.raises(ValueError, match=r"evaluate.regression.path: .*general.jsonl does not exist"):
        read_records(RegressionSection(**GENERAL), tmp_path)


def test_conditions_on_general_prompts_need_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is called tuned.regression_loss"):
        tiny_params(evaluate={"gate": ["tuned.regression_loss <= 1"]})


def test_answer_that_the_task_can_not_score_stops_before_training(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    write_rows(tmp_path, ROWS)
    params = tiny_params(evaluate={"regression": {**GENERAL, "task": "json"}}, quantize={"method": "none"})
    with pytest.raises(ValueError, match=r"evaluate.regression.task, row general.jsonl:1: the reference is not JSON"):
        check_later_stages(params, paths)


def test_shipped_rows_are_short_and_all_different() -> None:
    section = load_params(REPO / "params.yaml").evaluate.regression
    records = read_records(section, REPO)
    assert len(records) == 32
    assert len({record["messages"][0]["content"] for record in records}) == 32
    assert all(len(record["messages"][1]["content"]) < 100 for record in records)
