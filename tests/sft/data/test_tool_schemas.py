"""Tools must be JSON Schema, and calls must match the tools of their record."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft.data.quality import tool_call, tool_schema

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def row(schema: dict[str, Any], name: str = "weather", arguments: str = '{"city": "Oslo"}', times: int = 1) -> Any:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}] * times
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": json.dumps(tools)}


def test_a_call_that_fits_its_tool_is_fine() -> None:
    assert tool_schema(row(CITY)) is None
    assert tool_call(row(CITY)) is None
    assert tool_schema(row({})) is None
    no_tools = {"messages": row(CITY)["messages"]}
    assert (tool_schema(no_tools), tool_call(no_tools)) == (None, None)
    split = {"prompt": row(CITY)["messages"][:1], "completion": row(CITY)["messages"][1:], "tools": row(CITY)["tools"]}
    assert tool_call(split) is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row({"type": "str"}), "parameters.type of 'weather': 'str' is not valid"),
        (row({"type": "object", "properties": {"a": {"type": "dict"}}}), "parameters.properties.a.type of 'weather'"),
        (row({"properties": {"city": {"pattern": "("}}}), "parameters.properties.city.pattern of 'weather'"),
        (row(CITY, times=2), "two tools are named 'weather'"),
    ],
)
def test_tools_that_are_not_a_schema_are_found(bad: Any, words: str) -> None:
    problem = tool_schema(bad)
    assert problem is not None
    assert words in problem.detail
    assert tool_call(bad) is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(CITY, name="wether"), "message 1 calls 'wether', offered are ['weather']"),
        (row(CITY, arguments='{"city": 3}'), "message 1 calls 'weather': arguments.city: 3 is not of type 'string'"),
        (row(CITY, arguments="{}"), "arguments: 'city' is a required property"),
        (row(CITY, arguments='{"city"'), "the arguments are not JSON"),
        (row({"$ref": "http://127.0.0.1:9/x.json"}), "its schema refers to what is not in it"),
        (row({"$ref": "#"}), "its schema refers to itself without end"),
        (row({"properties": {"city": {"$ref": "#/x"}}, "x": {"pattern": "("}}), "is not a regular expression"),
    ],
)
def test_calls_that_do_not_fit_are_found(bad: Any, words: str) -> None:
    problem = tool_call(bad)
    assert problem is not None
    assert words in problem.detail
