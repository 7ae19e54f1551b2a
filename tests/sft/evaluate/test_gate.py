"""The gate: conditions are parsed first, never executed as code, and never pass if a figure is missing."""

from __future__ import annotations

import math

import pytest

from sft.evaluate.gate import check_gate, parse_condition, parse_gate

RESULTS = {
    "tuned": {"loss": 1.0, "exact_match": 0.9},
    "quantized": {"loss": 1.04, "exact_match": 0.86, "nan": math.nan},
    "engine.vllm": {"exact_match": 0.86},
    "engine.llama_cpp.q8_0": {"equal_answers": 0.75},
}


@pytest.mark.parametrize(
    ("condition", "passed", "left", "right"),
    [
        ("tuned.exact_match >= 0.85", True, 0.9, 0.85),
        ("quantized.loss <= 1.05 * tuned.loss", True, 1.04, 1.05),
        ("quantized.exact_match >= tuned.exact_match - 0.03", False, 0.86, 0.87),
        ("0.5 < tuned.loss / 2 + 0.1", True, 0.5, 0.6),
        ("-tuned.loss > -2", True, -1.0, -2.0),
        ("engine.vllm.exact_match >= quantized.exact_match - 0.01", True, 0.86, 0.85),
        ("engine.llama_cpp.q8_0.equal_answers >= 0.9", False, 0.75, 0.9),
    ],
)
def test_condition_compares_two_expressions(condition: str, passed: bool, left: float, right: float) -> None:
    row = check_gate(parse_gate([condition]), RESULTS)[0]
    assert row.passed is passed
    assert (row.left, row.right) == (pytest.approx(left), pytest.approx(right))


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("merged.loss <= 2", "merged.loss was not measured"),
        ("tuned.rouge >= 0", "tuned.rouge was not measured"),
        ("quantized.nan < 5", "not finite"),
        ("tuned.loss / (tuned.loss - 1) > 0", "can't be computed: float division by zero"),
    ],
)
def test_condition_without_a_number_fails_and_says_why(condition: str, reason: str) -> None:
    row = check_gate([parse_condition(condition)], RESULTS)[0]
    assert not row.passed
    assert reason in row.reason


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "tuned.loss",
        "tuned.loss = 1",
        "tuned.loss == 1",
        "0 < tuned.loss < 1",
        "tuned.loss < 1 and tuned.loss > 0",
        "loss < 1",
        "1 < 2",
        "tuned.loss.real.imag < 1",
        "__import__('os').system('true') < 1",
        "tuned.loss < True",
        "tuned.loss ** 9 < 1",
        "tuned.loss < '1'",
        "tuned.loss <",
        "(" * 200 + "tuned.loss" + ")" * 200 + " < 1",
    ],
)
def test_anything_else_is_refused_when_it_is_parsed(condition: str) -> None:
    with pytest.raises(ValueError, match="gate condition"):
        parse_condition(condition)


def test_all_problems_come_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="gate condition") as error:
        parse_gate(
            ["tuned.exact_mach >= 1", "nonsense", "tuned.loss < 1"], available={"tuned.exact_match", "tuned.loss"}
        )
    first, second = str(error.value).splitlines()
    assert "nothing is called tuned.exact_mach; did you mean tuned.exact_match?" in first
    assert "'nonsense' must compare once" in second


def test_names_of_the_champion_have_three_parts() -> None:
    (condition,) = parse_gate(["tuned.loss <= 1.05 * champion.tuned.loss"])
    assert condition.names == ("tuned.loss", "champion.tuned.loss")
    (row,) = check_gate([condition], {"tuned": {"loss": 2.0}, "champion.tuned": {"loss": 2.0}})
    assert (row.passed, row.left, row.right) == (True, 2.0, 2.1)
