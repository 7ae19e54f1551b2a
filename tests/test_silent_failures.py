"""The suite of silent failures: this library's verdicts, the rule that finds verdicts, and the page of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.silent_failures.case import Case, NotOffered, Outcome, TrainingLost, judge
from benchmarks.silent_failures.cases import KINDS, load_cases
from benchmarks.silent_failures.libraries import LIBRARIES, Library, Sft, trained_stretches
from benchmarks.silent_failures.table import LIBRARIES as COLUMNS
from benchmarks.silent_failures.table import PAGE, page, read_results
from benchmarks.silent_failures.tiny import make_tokenizer

CASES = load_cases()

GOOD = ("right", "refused", "warned")

OPEN: set[str] = set()
"""Cases that are known to be wrong here and are being worked on; the page shows them as they are."""


@pytest.fixture(scope="module")
def sft() -> Library:
    return Sft()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quick])
def test_this_library_is_right_or_says_what_is_wrong(name: str, sft: Library) -> None:
    result = judge(CASES[name], sft)
    if name in OPEN and result.verdict not in GOOD:
        pytest.xfail(f"known: {result}")
    assert result.verdict in GOOD, result
    stored = read_results("sft")["cases"][name]["verdict"]
    assert stored == result.verdict or name in OPEN, "store them: make bench-failures"


def test_page_shows_the_stored_results() -> None:
    results = {name: read_results(name) for name in COLUMNS}
    assert set(COLUMNS) == set(LIBRARIES)
    assert PAGE.read_text(encoding="utf-8") == page(results)
    assert all(set(result["cases"]) == set(CASES) for result in results.values())
    assert {case.kind for case in CASES.values()} == set(KINDS)


def verdict_on(run: Callable[[Any], Outcome], says: str = "max_length") -> str:
    return judge(Case("name", "kind", "title", (), says, ("read by a person",), True, run), Sft()).verdict


def failing(error: BaseException) -> Callable[[Any], Outcome]:
    def run(_: Any) -> Outcome:
        raise error

    return run


def warning(text: str) -> Callable[[Any], Outcome]:
    def run(_: Any) -> Outcome:
        print(text)
        return Outcome(1.0, 2.0)

    return run


def test_right_values_are_equal_up_to_the_tolerance() -> None:
    assert verdict_on(lambda _: Outcome([1.0, 2.0001], [1.0, 2.0])) == "right"
    assert verdict_on(lambda _: Outcome([1.0, 2.01], [1.0, 2.0])) == "wrong"
    assert verdict_on(lambda _: Outcome("a", "b", also=("a",))) == "right"
    assert verdict_on(lambda _: Outcome(float("nan"), 2.0)) == "wrong"


def test_error_that_names_what_is_wrong_is_a_refusal() -> None:
    assert verdict_on(failing(ValueError("raise max_length"))) == "refused"
    assert verdict_on(failing(ValueError("a text that was read by a person"))) == "refused"
    assert verdict_on(failing(ValueError("no"))) == "crash"
    assert verdict_on(failing(NotOffered("none"))) == "not offered"


def test_cause_of_an_error_counts_as_its_message() -> None:
    error = ValueError("no")
    error.__cause__ = TypeError("max_length")
    assert verdict_on(failing(error)) == "refused"


def test_error_that_python_raises_by_itself_is_a_crash() -> None:
    assert verdict_on(failing(AttributeError("no attribute max_length"))) == "crash"
    assert verdict_on(failing(IndexError("max_length out of range"))) == "crash"


def test_error_after_the_first_update_is_a_crash() -> None:
    error = TrainingLost()
    error.__cause__ = ValueError("max_length")
    assert verdict_on(failing(error)) == "crash"


def test_wrong_value_with_a_warning_that_names_what_is_wrong_is_warned() -> None:
    assert verdict_on(warning("2 rows are longer than max_length")) == "warned"
    assert verdict_on(warning("something else")) == "wrong"
    assert verdict_on(warning("{'loss': 1, 'max_length': 2}")) == "wrong"


def test_trained_stretches_are_the_runs_of_labels() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("Paris is the capital")["input_ids"]
    labels = [ids[0], -100, *ids[2:]]
    assert trained_stretches(ids, labels, tokenizer) == [tokenizer.decode(ids[:1]), tokenizer.decode(ids[2:])]
