"""A condition that is true for all results or for none is rejected; all other conditions are accepted."""

from __future__ import annotations

import math

import pytest

from sft.evaluate.gate import check_ranges, parse_gate

RANGES = {"tuned.share": (0.0, 1.0), "base.share": (0.0, 1.0), "tuned.loss": (0.0, math.inf)}


def check(*conditions: str) -> None:
    check_ranges(parse_gate(conditions), lambda name: RANGES.get(name, (-math.inf, math.inf)))


@pytest.mark.parametrize(
    "condition",
    [
        "tuned.share >= 85",
        "tuned.share > 1",
        "tuned.share - base.share >= 1.01",
        "tuned.share / 100 > 0.01",
        "tuned.loss < 0",
        "-tuned.loss > 0",
        "2 * tuned.share >= 2.5",
        "1.5 <= tuned.share",
    ],
)
def test_condition_that_can_never_be_true_is_refused(condition: str) -> None:
    with pytest.raises(ValueError, match=r"can never be true: tuned\.(share|loss) is (between 0 and 1|at least 0)"):
        check("tuned.share > 0.5", condition)


@pytest.mark.parametrize(
    "condition",
    ["tuned.share >= 0", "tuned.share <= 1", "tuned.share >= -1", "tuned.loss >= 0", "tuned.share + 1 >= base.share"],
)
def test_condition_that_is_always_true_is_refused(condition: str) -> None:
    with pytest.raises(ValueError, match="is true for all results: tuned"):
        check(condition)


def test_figure_compared_with_itself_is_refused_and_all_problems_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"compares a figure with itself\n.*tuned.share >= 2"):
        check("tuned.own >= tuned.own", "tuned.share >= 2")


@pytest.mark.parametrize(
    "condition",
    [
        "tuned.share >= 0.85",
        "tuned.share >= 1",
        "tuned.share > 0",
        "tuned.loss > 0",
        "tuned.share >= base.share - 0.05",
        "tuned.loss <= 1.05 * base.loss",
        "tuned.loss / base.loss <= 1",
        "tuned.own >= 85",
        "tuned.own * tuned.loss > 3",
        "0 * tuned.own > 1",
    ],
)
def test_condition_that_can_be_true_or_false_is_accepted(condition: str) -> None:
    check(condition)
