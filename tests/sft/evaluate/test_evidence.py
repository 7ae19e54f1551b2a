"""Intervals of gate conditions, against published values, and the three verdicts that follow from them."""

from __future__ import annotations

import numpy as np
import pytest

from sft.evaluate.evidence import Evidence, Measured, correlation, expression_interval, mean_parts
from sft.evaluate.gate import check_gate, parse_gate, passes_with
from sft.evaluate.intervals import mean_interval


def share(right: list[int]) -> Measured:
    scores = {str(number): float(value) for number, value in enumerate(right)}
    return Measured(mean_interval(list(scores.values())), len(right), mean_parts(scores))


def pairs(both: int, first: int, second: int, neither: int) -> Evidence:
    """Two models on the same rows: both right, only the first, only the second, none."""
    a = [1] * both + [1] * first + [0] * second + [0] * neither
    b = [1] * both + [0] * first + [1] * second + [0] * neither
    return {"a.share": share(a), "b.share": share(b)}


def test_difference_of_paired_shares_has_newcombes_interval() -> None:
    evidence = pairs(36, 12, 2, 0)
    figures = {"a.share": 48 / 50, "b.share": 38 / 50}
    found = expression_interval(lambda f: f["a.share"] - f["b.share"], figures, evidence)
    assert found == (pytest.approx(0.0569, abs=1e-4), pytest.approx(0.3404, abs=1e-4))  # as he gives for this table


def test_interval_of_a_difference_of_means_is_that_of_the_paired_rows() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(2.0, 0.5, 400)
    b = a - 0.1 + rng.normal(0.0, 0.05, 400)
    evidence = {
        name: Measured(mean_interval(list(rows)), 400, mean_parts({str(i): x for i, x in enumerate(rows)}))
        for name, rows in (("a.loss", a), ("b.loss", b))
    }
    figures = {"a.loss": float(a.mean()), "b.loss": float(b.mean())}
    low, high = expression_interval(lambda f: f["b.loss"] - f["a.loss"], figures, evidence)
    half = 1.96 * float((b - a).std(ddof=1)) / 20
    assert high - low == pytest.approx(2 * half, rel=0.2)
    assert correlation(evidence["a.loss"], evidence["b.loss"]) > 0.99


def verdicts(conditions: list[str], right: int, rows: int) -> list[str]:
    evidence = {"tuned.exact_match": share([1] * right + [0] * (rows - right))}
    results = {"tuned": {"exact_match": right / rows, "size_mb": 3.0}}
    return [row.verdict for row in check_gate(parse_gate(conditions), results, evidence)]


def test_condition_is_shown_not_shown_or_failed() -> None:
    conditions = [f"tuned.exact_match >= {limit}" for limit in (0.8, 0.85, 0.9, 0.95)]
    assert verdicts(conditions, 93, 100) == ["shown", "shown", "not shown", "failed"]
    assert verdicts(["0.9 <= tuned.exact_match", "tuned.size_mb < 4"], 93, 100) == ["not shown", "shown"]


def test_fewer_than_twenty_rows_show_nothing() -> None:
    assert verdicts(["tuned.exact_match >= 0.1"], 19, 19) == ["not shown"]
    assert verdicts(["tuned.exact_match >= 0.1"], 20, 20) == ["shown"]


def test_condition_that_is_not_shown_passes_only_where_the_value_decides() -> None:
    results, evidence = {"tuned": {"exact_match": 0.5}}, {"tuned.exact_match": share([1, 0])}
    (condition,) = parse_gate(["tuned.exact_match >= 0.4"])
    strict, lax = (check_gate([condition], results, evidence, needs)[0] for needs in ("interval", "value"))
    assert (strict.passed, lax.passed) == (False, True)
    assert strict.reason == "0.5 >= 0.4, not shown: measured on 2 rows, and fewer than 20 show nothing"


def test_gate_that_the_base_passes_is_found_whatever_the_sizes_are() -> None:
    results = {"base": {"loss": 2.0, "size_mb": 9.0}, "tuned": {"loss": 1.0, "size_mb": 3.0}}
    gate = parse_gate(["tuned.loss <= 2 * base.loss", "tuned.size_mb < 4"])
    assert passes_with(gate, results, "base", ["size_mb"])
    assert not passes_with(parse_gate(["tuned.loss < base.loss"]), results, "base", ["size_mb"])
