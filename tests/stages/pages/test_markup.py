"""Every page is rendered with markup in every text that it shows, and shows it as text."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunInputs, RunTag

from flows.runs.dvc_stage import Outcome
from flows.runs.report import Row, RunReport
from sft.evaluate.gate import GateRow
from stages.checkout.artifacts import read_json, read_jsonl, write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.evaluation.row_scores import compare_rows, read_row_scores
from stages.pages import report
from stages.pages.comparison import Side, write_comparison
from stages.pages.data import SplitFacts, write_data_page
from stages.pages.model_card import write_card
from stages.pages.promotion import Decision, write_page
from stages.tools import compare
from stages.tracking.champion import Champion
from stages.tracking.recorded import Recorded, find_causes, recorded_run
from tests.stages.pages.test_report import paths as paths
from tests.stages.tiny_run import tiny_params

EVIL = "<img src=x onerror=alert(1)>\"'`|</code></td>[l](javascript:alert(1))\\n\\n# h\x1b[2K"
STATED = {"action", "stage", "kind", "purpose", "method", "reason_of", "figures", "gate_passed", "verdict"}
"""Keys whose values are words of the pipeline, by which pages choose what they show."""


def poisoned(value: Any, key: str = "") -> Any:
    """Return a value with markup at the end of every text in it."""
    if isinstance(value, dict):
        return {name: poisoned(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part, key) for part in value]
    return value + EVIL if isinstance(value, str) and key not in STATED else value


@pytest.fixture(scope="module")
def hostile(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A finished run with markup in every text of its outs."""
    root = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(paths.root, root)
    for file in (root / "outs").rglob("*.json*"):
        if file.suffix == ".jsonl":
            write_jsonl(file, [poisoned(row) for row in list(read_jsonl(file))])
        else:
            write_json(file, poisoned(read_json(file)))
    return Paths(root)


class Seen(HTMLParser):
    """What a browser would run, load or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("img", "script", "iframe", "object", "embed", "form", "base"):
            self.found.append(tag)
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name.startswith("on")]
        self.found += [
            f"{tag} {name}={value}"
            for name, value in attrs
            if name in ("src", "href", "action", "data") and not (value or "").startswith("#")
        ]


def dangers(page: str) -> list[str]:
    seen = Seen()
    seen.feed(page)
    return seen.found


def rendered(markdown: str) -> str:
    """The HTML of Markdown, in which HTML is allowed, as it is on Prefect's page and on the hub."""
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown)


def test_a_page_with_markup_would_be_noticed() -> None:
    assert dangers(f"<td>{EVIL}</td>") == ["img", "img onerror=alert(1)", "img src=x"]
    assert len(dangers(rendered(EVIL.replace("\x1b[2K", "")))) > 2


def test_the_report(hostile: Paths) -> None:
    report.write_evaluation_page(tiny_params(), hostile)
    page = hostile.evaluation_page.read_text(encoding="utf-8")
    assert dangers(page) == []
    assert page.count("&lt;img src=x") > 10


def test_the_data_page(hostile: Paths) -> None:
    figures = {
        "tokens": 10, "trained_tokens": 5, "rows": 1, "fill": 0.5, "documents": 1, "tokens_lost": 0,
        "trained_tokens_lost": 0, "untrained_pieces": 0, "answers_cut": 0, "trained_tokens_cut": 0,
        "tokens_repeated": 0,
    }  # fmt: skip
    known = read_json(hostile.metrics("pack")) if hostile.metrics("pack").exists() else {}
    figures = {**figures, **known.get("train", known), "truncated": 0, "split": 0, "dropped": 0}
    facts = SplitFacts(figures, *(np.array([3, 4]) for _ in range(3)))
    preview = {
        "id": EVIL, "pieces": [{"text": EVIL, "is_trained": True}], "num_tokens": 3, "start": 0, "num_in_document": 3,
        "num_hidden": 0,
    }  # fmt: skip
    for name in ("load", "format"):
        if not hostile.out(name, "train.jsonl").exists():
            write_jsonl(hostile.out(name, "train.jsonl"), [])
    card = read_json(hostile.out("load", "card.json"))
    more = {"columns": [EVIL], "unused": [EVIL], "dropped": {EVIL: 1}}
    card["sources"] = [{**source, **more} for source in card["sources"]]
    write_json(hostile.out("load", "card.json"), card)
    write_data_page(hostile, {"train": facts, "eval": facts}, [preview])
    page = hostile.data_page.read_text(encoding="utf-8")
    assert dangers(page) == []
    assert page.count("&lt;img src=x") > 3


def test_the_page_of_the_promotion(hostile: Paths, tmp_path: Path) -> None:
    row = {"condition": EVIL, "passed": True, "reason": EVIL, "left": 1.0, "right": 1.0, "verdict": "shown"}
    decision = Decision(
        name=EVIL,
        version=EVIL,
        before={"candidate": EVIL, "champion": EVIL},
        champion=Champion(EVIL, EVIL, EVIL, {}, EVIL),
        is_comparable=False,
        gate=[row],
        promotion=[GateRow(**row)],
        promoted=False,
    )
    write_page(tmp_path / "promotion.html", decision, [], read_json(hostile.out("evaluate", "results.json")))
    page = (tmp_path / "promotion.html").read_text(encoding="utf-8")
    assert dangers(page) == []
    assert page.count("&lt;img src=x") > 8


def test_the_model_card(hostile: Paths, tmp_path: Path) -> None:
    params = tiny_params()
    publish = params.publish.model_copy(update={"registered_model": f"shop{EVIL}"})
    train = params.train.model_copy(update={"lora_target_modules": [EVIL]})
    changed = params.model_copy(update={"publish": publish, "train": train})
    write_card(tmp_path / "README.md", changed, hostile, "quantized", EVIL)
    _, _, body = (tmp_path / "README.md").read_text(encoding="utf-8")[4:].partition("\n---\n")
    assert "\x1b" not in body
    page = rendered(body)
    assert dangers(page) == []
    assert page.count("&lt;img src=x") > 5
    assert [line for line in body.splitlines() if line.startswith("# ")] == [body.split("\n")[1]]


def test_the_page_of_a_run_in_prefect() -> None:
    made = RunReport({EVIL: EVIL}, [Row(EVIL, Outcome.FAILED, 1.0, EVIL)])
    page = rendered(made.markdown(f"{EVIL}\n```\n<img src=y>\n"))
    assert dangers(page) == []
    assert page.count("&lt;img src=x") == 5
    assert [page.count(tag) for tag in ("<h2>", "<h3>", "<h1>", "<tr>")] == [1, 1, 0, 4]


def test_the_comparison_and_its_runs_in_mlflow() -> None:
    def run(number: int) -> Run:
        info = RunInfo(f"{number}" * 32, "1", "user", "FINISHED", 0, 0, "active", run_name=f"{EVIL}\n{number}")
        data = RunData(
            [Metric(f"evaluate.{EVIL}", float(number), 0, 0)],
            [Param(EVIL, f"{EVIL}\n{number}")],
            [RunTag("git.commit", f"{EVIL}{number}"), RunTag("sft.gate", EVIL), RunTag(f"version.{EVIL}", str(number))],
        )
        return Run(info, data, RunInputs([]))

    lines = compare.report(recorded_run(run(1)), recorded_run(run(2)))
    assert not any("\x1b" in line or "\n" in line for line in lines)
    assert sum(EVIL[:20] in line for line in lines) == 5


def test_the_page_of_a_comparison(hostile: Paths, tmp_path: Path) -> None:
    rows = read_row_scores(hostile.out("evaluate"))
    assert rows.answers
    sides = [
        Side(
            Recorded(EVIL, EVIL, {"git.commit": EVIL, "sft.gate": EVIL}, {EVIL: name}, {EVIL: name}, {}),
            folder,
            answers,
        )
        for name, folder, answers in (("a", hostile.root, rows.answers), (EVIL, hostile.root, rows.answers))
    ]
    causes = find_causes(sides[0].result, sides[1].result)
    write_comparison(tmp_path / "page.html", (sides[0], sides[1]), causes, compare_rows(rows, rows), EVIL)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert dangers(page) == []
    assert page.count("&lt;img src=x") > 10


def test_json_beside_the_pages_stays_json(hostile: Paths) -> None:
    assert json.loads(json.dumps(poisoned({"a": "b"}))) == {"a": f"b{EVIL}"}
