"""Regular expressions and JSON schemas from elsewhere end in time."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from sft.data.quality import tool_call
from sft.evaluate.tasks import last_found
from sft.untrusted import patterns
from sft.untrusted.patterns import PatternError, check_pattern, fullmatches, last_match

BACKTRACKS = r"(a+)+$"


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)


def test_matches_are_those_of_python() -> None:
    assert fullmatches(r"a\d", ["a1", "a", "xa1"]) == [True, False, False]
    assert last_match(r"#(\d)(x)?", "#1 #2") == ("#2", ["2", None])
    assert last_match("b", "a") is None


def test_an_expression_that_backtracks_without_end_is_stopped() -> None:
    with pytest.raises(PatternError, match=r"matching it takes more than 0\.5 s"):
        fullmatches(BACKTRACKS, ["a" * 60 + "!"])
    with pytest.raises(ValueError, match=r"task regex:\(a\+\)\+\$: matching it takes more than 0\.5 s, in 'aaa"):
        last_found(re.compile(BACKTRACKS), "a" * 60 + "!")


@pytest.mark.parametrize("pattern", ["(" * 4000 + ")" * 4000, "a" * 10_001, "("], ids=["deep", "long", "open"])
def test_expressions_that_cannot_be_compiled_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        check_pattern(pattern)


def row(schema: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    return {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": json.dumps([tool]),
    }


def test_a_schema_whose_expression_backtracks_is_a_problem_of_the_row() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": BACKTRACKS}}}
    problem = tool_call(row(schema, {"x": "a" * 60 + "!"}))
    assert problem is not None
    assert problem.detail == "message 1 calls 'f': its schema can't be checked: matching it takes more than 0.5 s"
    assert tool_call(row(schema, {"x": "aaa"})) is None


def test_a_schema_whose_references_multiply_is_a_problem_of_the_row() -> None:
    steps = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}
    problem = tool_call(row({"$defs": {**steps, "a60": {}}, "$ref": "#/$defs/a0"}, {"x": 1}))
    assert problem is not None
    assert problem.detail == "message 1 calls 'f': its schema can't be checked: matching it takes more than 0.5 s"
