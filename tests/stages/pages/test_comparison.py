"""The page that compares two results: tested figures, causes, curves of both, answers in groups, a warning on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.checkout.artifacts import write_json, write_jsonl, write_text
from stages.evaluation.row_scores import compare_rows, read_row_scores, rows_warning
from stages.pages.comparison import Side, write_comparison
from stages.pages.page import NBSP
from stages.tracking.recorded import CURVE, Recorded, find_causes

NUM_ROWS = 30


def write_side(folder: Path, name: str, right: set[int], rows: range, rate: str) -> Side:
    """Write a result whose tuned model is right in some rows, and whose loss is lower the more it is right."""
    answers = [
        {
            "id": f"eval:{number}",
            "prompt": f"shared\nquestion {number}",
            "reference": "yes",
            "answers": {
                "tuned": {
                    "text": "yes" if number in right else f"no from {name}",
                    "stopped": True,
                    "num_tokens": 1,
                    "scores": {"exact_match": float(number in right)},
                }
            },
        }
        for number in rows
    ]
    documents: list[dict[str, Any]] = [
        {
            "document": f"d{number}",
            "general": False,
            "num_tokens": 10,
            "models": {"tuned": {"loss": 10.0 - (number in right), "token_accuracy": 5.0}},
        }
        for number in rows
    ]
    evaluated = folder / "outs" / "evaluate"
    write_jsonl(evaluated / "generations.jsonl", answers)
    write_jsonl(evaluated / "documents.jsonl", documents)
    share = len(right & set(rows)) / len(rows)
    write_json(evaluated / "results.json", {"models": {"tuned": {"exact_match": share, "loss": 1 - share / 10}}})
    write_text(folder / CURVE, f"step,loss,eval_loss\n1,2.0,2.1\n2,{1 - share},\n")
    result = Recorded(name, name * 4, {"git.commit": "c1"}, {"train.learning_rate": rate}, {"data/a.jsonl": "5e"}, {})
    return Side(result, folder, read_row_scores(evaluated).answers)


def page_of(tmp_path: Path, sides: tuple[Side, Side]) -> str:
    rows = [read_row_scores(side.folder / "outs" / "evaluate") for side in sides]
    causes = find_causes(sides[0].result, sides[1].result)
    differs = set(rows[0].answers) != set(rows[1].answers)
    write_comparison(tmp_path / "page.html", sides, causes, compare_rows(*rows), rows_warning(rows) if differs else "")
    return (tmp_path / "page.html").read_text(encoding="utf-8").replace(NBSP, " ")


@pytest.fixture
def first(tmp_path: Path) -> Side:
    return write_side(tmp_path / "a", "one", set(range(5, 15)), range(NUM_ROWS), "0.001")


def test_page_has_tested_figures_causes_curves_and_answers(first: Side, tmp_path: Path) -> None:
    second = write_side(tmp_path / "b", "two", set(range(28)), range(NUM_ROWS), "0.002")
    page = page_of(tmp_path, (first, second))
    assert "<h1>B is better in 2 of 2 tested figures</h1>" in page
    (row,) = [line for line in page.splitlines() if ">Exact match</th>" in line]
    # 18 rows are right in B alone and none in A alone: 2 * 0.5 ** 18
    assert '33.3 %</td><td class="num">93.3 %</td><td class="num yes">+60.0 points</td>' in row
    assert "&lt; 0.001" in row
    assert "McNemar, exact" in row
    assert "train.learning_rate" in page
    assert "The same in both: data, base model, code, versions, machine." in page
    assert page.count("<figure") == 2
    groups = ["Wrong in A, right in B (18)", "Wrong in both, with different answers (2)", "Right in both (10)"]
    assert [page.index(name) for name in groups] == sorted(page.index(name) for name in groups)
    assert "Right in A, wrong in B" not in page
    assert "http" not in page


def test_results_on_other_rows_are_compared_on_those_in_common_with_a_warning(first: Side, tmp_path: Path) -> None:
    second = write_side(tmp_path / "b", "two", set(range(5, 15)), range(10, NUM_ROWS + 5), "0.001")
    page = page_of(tmp_path, (first, second))
    assert "A was measured on 30 held-out rows and B on 25, 20 of them the same" in page
    assert "20 prompts that both results have (A 30, B 25)" in page
    assert "<h1>No figure differs by more than chance, and no input differs</h1>" in page


def test_results_without_common_rows_are_not_tested(first: Side, tmp_path: Path) -> None:
    second = write_side(tmp_path / "b", "two", set(), range(100, 105), "0.001")
    page = page_of(tmp_path, (first, second))
    assert "<h1>The figures differ; no row was measured in both, so nothing is tested</h1>" in page
    assert "No held-out prompt was answered in both results." in page
