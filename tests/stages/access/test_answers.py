"""Text, reasoning and tool calls of an answer, whole and in pieces of any length."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.access.answers import CALL_FORMATS, REASONING_MARKS, AnswerParser, Event

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
SPECIAL = {"<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"}
ROME = ("weather", {"city": "Rome"})


def read(answer: str, form: str | None, reasoning: str | None = None, prompt: str = "", size: int = 10**6) -> Any:
    """Return text, reasoning and calls of an answer that arrives in pieces of `size` characters."""
    calls = CALL_FORMATS[form] if form else None
    parser = AnswerParser(calls, REASONING_MARKS.get(reasoning or ""), SPECIAL, prompt, TOOLS)
    events: list[Event] = [*parser.initial_events]
    for start in range(0, len(answer), size):
        events += parser.feed(answer[start : start + size])
    events += parser.finalize()[1]
    texts = dict.fromkeys(("content", "reasoning_content"), "")
    found = []
    for event in events:
        if event["type"] == "region_chunk":
            texts[event["field"]] += event["text"]
        else:
            function = event["value"]["function"]
            found.append((function["name"], json.loads(function["arguments"])))
    return texts["content"], texts["reasoning_content"], found


def in_pieces(answer: str, form: str | None, reasoning: str | None = None, prompt: str = "") -> Any:
    """Return the parts of an answer, and check that they do not depend on the pieces in which it arrives."""
    whole = read(answer, form, reasoning, prompt)
    for size in (1, 2, 3, 7, 16):
        assert read(answer, form, reasoning, prompt, size) == whole
    return whole


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter></function></tool_call>"),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]<|im_end|>'),
        ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}<|im_end|>'),
        ("mistral", '[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{"city": "Rome"}'),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Rome"}}<|im_end|>'),
        ("llama3_json", '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}'),
        ("llama3_json", '\n{"name": "weather", "arguments": {"city": "Rome"}}'),
    ],
)  # fmt: skip
def test_a_call_is_read(form: str, answer: str) -> None:
    assert in_pieces(answer, form) == ("", "", [ROME])


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("hermes", "\n".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in "ab")),
        ("mistral", '[TOOL_CALLS][{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]'),
        ("mistral", "[TOOL_CALLS]a[ARGS]{}b[ARGS]{}"),
        ("mistral", "[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]b[ARGS]{}<|im_end|>"),
    ],
)  # fmt: skip
def test_several_calls_are_read_in_order(form: str, answer: str) -> None:
    assert in_pieces(answer, form) == ("", "", [("a", {}), ("b", {})])


def test_llama_separates_calls_by_semicolons() -> None:
    one = '{"name": "weather", "parameters": {"city": "Rome"}}'
    assert in_pieces(f"{one}; {one}", "llama3_json")[2] == [ROME, ROME]


def test_values_have_the_types_of_the_schema() -> None:
    answer = (
        "<tool_call><function=weather><parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter></function>"
        "</tool_call>"
    )
    assert in_pieces(answer, "qwen3_coder")[2] == [("weather", {"city": "12", "days": 3})]


def test_text_and_reasoning_before_a_call_are_kept_without_the_space_between_them() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    answer = f"<think>\nA city.\n\nRome.\n</think>\n\nI look.\n\n{call}<|im_end|>\n"
    assert in_pieces(answer, "hermes", "qwen3") == ("I look.", "A city.\n\nRome.", [ROME])
    assert in_pieces(f"A city.\n</think>\n\n{call}", "hermes", "deepseek_r1", "...<think>\n") == ("", "A city.", [ROME])
    assert in_pieces("[THINK]A city.[/THINK]Rome.", None, "mistral") == ("Rome.", "A city.", [])


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'),
        ("hermes", "<tool_call>\nno JSON\n</tool_call>"),
        ("hermes", '<tool_call>{"city": "Rome"}</tool_call>'),
        ("mistral", "[TOOL_CALLS]weather[ARGS]{"),
        ("qwen3_coder", "<tool_call><function=weather></tool_call>"),
        ("llama3_json", '{"name": "Ada", "parameters": {"age": 36}}'),
        ("llama3_json", '{"city": "Rome"}'),
        ("llama3_json", "{" * 5000),
    ],
)
def test_what_is_not_a_call_stays_the_text_that_the_model_wrote(form: str, answer: str) -> None:
    assert read(answer, form) == (answer, "", [])
    assert read(answer, form, size=3) == (answer, "", [])


def test_an_answer_without_calls_is_unchanged() -> None:
    for answer in ("Rome.", " Rome <tool is \n nice.\n", "a < b", '{"city": 1}\n', ""):
        assert in_pieces(f"{answer}<|im_end|>", "hermes", "qwen3") == (answer, "", [])
