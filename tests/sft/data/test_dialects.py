"""Rows in the forms of other projects become the same records, with reasoning, calls, weights and tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft.data.messages import RowError, validate_record
from sft.data.records import detect_layout, normalize

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
USER = {"role": "user", "content": "Weather in Lima?"}
FINAL = {"role": "assistant", "content": "Grey."}
LAYOUT = detect_layout(["messages"])
ARGUMENTS = '{"city": "Lima"}'


def record_of(row: dict[str, Any]) -> dict[str, Any]:
    record = normalize(row, detect_layout(row))
    assert validate_record(record) == []
    return record


def asked(**call: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": ARGUMENTS}
    return {"role": "assistant", "content": "", "tool_calls": [{**call, "type": "function", "function": function}]}


def test_llama_factory_v1() -> None:
    def message(role: str, weight: float, *parts: tuple[str, str]) -> dict[str, Any]:
        return {
            "role": role,
            "content": [{"type": kind, "value": value} for kind, value in parts],
            "loss_weight": weight,
        }

    call = '{"name": "weather", "arguments": {"city": "Lima"}}'
    row = {
        "messages": [
            message("system", 0.0, ("text", "Help."), ("tools", json.dumps([TOOL]))),
            message("user", 0.0, ("text", "Weather in Lima?")),
            message("assistant", 0.5, ("reasoning", "I look."), ("text", "Wait."), ("tool_call", call)),
            message("tool", 0.0, ("text", "grey")),
            message("assistant", 1.0, ("reasoning", "Grey it is."), ("text", "Grey.")),
        ]
    }
    record = record_of(row)
    assert json.loads(record["tools"]) == [TOOL]
    assert record["messages"] == [
        {"role": "system", "content": "Help.", "weight": 0.0},
        {**USER, "weight": 0.0},
        {**asked(), "content": "Wait.", "reasoning_content": "I look.", "weight": 0.5},
        {"role": "tool", "content": "grey", "weight": 0.0},
        {**FINAL, "reasoning_content": "Grey it is.", "weight": 1.0},
    ]


def test_anthropic() -> None:
    row = {
        "system": [{"type": "text", "text": "Help.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I look.", "signature": "EqQB"},
                    {"type": "redacted_thinking", "data": "Em8x"},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Lima"}},
                    {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Lima"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "grey"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "blue", "is_error": False},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]},
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
    }
    record = record_of(row)
    first, second = asked(id="t1")["tool_calls"] + asked(id="t2")["tool_calls"]
    assert json.loads(record["tools"]) == [TOOL]
    assert record["messages"] == [
        {"role": "system", "content": "Help."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [first, second]},
        {"role": "tool", "content": "grey", "tool_call_id": "t1"},
        {"role": "tool", "content": "blue", "tool_call_id": "t2"},
        FINAL,
    ]


@pytest.mark.parametrize("as_text", [False, True])
def test_gemini(as_text: bool) -> None:
    contents = [
        {"role": "user", "parts": [{"text": "Weather "}, {"text": "in Lima?"}]},
        {
            "role": "model",
            "parts": [
                {"text": "I look.", "thought": True},
                {"functionCall": {"name": "weather", "args": {"city": "Lima"}}, "thoughtSignature": "x"},
            ],
        },
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"sky": "grey"}}}]},
        {"role": "model", "parts": [{"text": "Grey."}]},
    ]
    declared = {
        "name": "weather",
        "description": "d",
        "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}},
    }
    tools = [{"functionDeclarations": [declared]}]
    record = record_of(
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Help."}]},
            "contents": json.dumps(contents) if as_text else contents,
            "tools": json.dumps(tools) if as_text else tools,
        }
    )
    assert json.loads(record["tools"]) == [TOOL]
    assert record["messages"] == [
        {"role": "system", "content": "Help."},
        USER,
        {**asked(), "reasoning_content": "I look."},
        {"role": "tool", "content": '{"sky": "grey"}', "name": "weather"},
        FINAL,
    ]


def test_openai_fine_tuning() -> None:
    row = {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": asked(id="c1")["tool_calls"], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "grey"}]},
            {"role": "assistant", "content": None, "refusal": "I may not say.", "weight": 1},
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    record = record_of(row)
    assert json.loads(record["tools"]) == [TOOL]
    assert record["messages"] == [
        USER,
        {**asked(id="c1"), "weight": 0},
        {"role": "tool", "content": "grey", "tool_call_id": "c1"},
        {"role": "assistant", "content": "I may not say.", "weight": 1},
    ]


def test_items_of_openai_responses() -> None:
    row = {
        "messages": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather in Lima?"}]},
            {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "I look."}]},
            {"type": "function_call", "id": "f1", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS},
            {"type": "function_call_output", "call_id": "c1", "output": "grey"},
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Grey.", "annotations": []}],
            },
        ],
        "tools": [{"type": "function", **TOOL["function"]}],
    }
    record = record_of(row)
    assert json.loads(record["tools"]) == [TOOL]
    assert record["messages"] == [
        USER,
        {**asked(id="c1"), "reasoning_content": "I look."},
        {"role": "tool", "content": "grey", "tool_call_id": "c1"},
        FINAL,
    ]


def test_calls_and_results_in_turns_of_their_own_are_joined() -> None:
    call = '{"name": "weather", "arguments": {"city": "Lima"}}'
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Lima?"},
            {"from": "gpt", "value": "Wait."},
            {"from": "tool_call", "value": f"<think>I look.</think>\n{call}"},
            {"from": "tool_call", "value": call},
            {"from": "tool_response", "value": "grey"},
            {"from": "tool_response", "value": "grey"},
            {"from": "chatgpt", "value": "Grey."},
        ]
    }
    record = normalize(row, detect_layout(row))
    assert [message["role"] for message in record["messages"]] == [
        "user", "assistant", "assistant", "tool", "tool", "assistant"
    ]  # fmt: skip
    del row["conversations"][1]
    assert record_of(row)["messages"][1] == {
        **asked(),
        "tool_calls": asked()["tool_calls"] * 2,
        "reasoning_content": "I look.",
    }


@pytest.mark.parametrize(
    "turns",
    [
        [{"human": "Weather in Lima?", "assistant": "Grey."}],
        [{"assistant": "Grey.", "human": "Weather in Lima?"}],
        [{"user": "Weather in Lima?"}, {"gpt": "Grey."}],
        ["Weather in Lima?", "Grey."],
        [["human", "Weather in Lima?"], ["gpt", "Grey."]],
        [{"parts": ["Weather ", "in Lima?"]}, {"role": "model", "parts": {"text": "Grey."}}],
        [{"role": "prompter", "text": "Weather in Lima?"}, {"role": "bard", "text": "Grey."}],
        [{"author": "user", "content": "Weather in Lima?"}, {"author": "Chatbot", "content": "Grey."}],
        [
            {"role": "user", "from": None, "content": None, "value": "Weather in Lima?"},
            {"role": None, "from": "gpt", "content": "Grey."},
        ],
    ],
)
def test_turns_under_other_keys(turns: list[Any]) -> None:
    assert record_of({"conversation": turns}) == {"messages": [USER, FINAL]}


def test_ms_swift() -> None:
    row = {"query": "And now?", "response": "Blue.", "history": [["Weather in Lima?", "Grey."]], "system": "Help."}
    assert record_of(row)["messages"] == [
        {"role": "system", "content": "Help."},
        USER,
        FINAL,
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Blue."},
    ]
    flagged = {"messages": [USER, {**FINAL, "loss": False}, USER, {**FINAL, "loss": True}]}
    assert [message.get("train") for message in record_of(flagged)["messages"]] == [None, False, None, True]


def test_reasoning_after_text_stays_in_its_place() -> None:
    parts = [{"type": "text", "text": "Hm: "}, {"type": "reasoning", "value": "x"}, {"type": "text", "text": "y"}]
    record = record_of({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert record["messages"][1]["content"] == [
        {"type": "text", "text": "Hm: "},
        {"type": "thinking", "thinking": "x"},
        {"type": "text", "text": "y"},
    ]


def test_images_of_other_forms() -> None:
    sources = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        {"inlineData": {"mimeType": "image/png", "data": "QUJD"}},
        {"type": "image_url", "value": "cat.png"},
    ]
    record = normalize(
        {"messages": [{"role": "user", "content": [*sources, {"type": "text", "text": "?"}]}]},
        detect_layout(["messages"]),
    )
    assert record["messages"][0]["content"] == [
        {"type": "image", "image": "data:image/png;base64,QUJD"},
        {"type": "image", "image": "data:image/png;base64,QUJD"},
        {"type": "image_url", "image_url": "cat.png"},
        {"type": "text", "text": "?"},
    ]


def test_a_list_that_a_tool_returned_stays_data() -> None:
    found = [{"type": "apple", "price": 1}]
    record = record_of({"messages": [USER, asked(), {"role": "tool", "content": found}, FINAL]})
    assert record["messages"][2]["content"] == '[{"type": "apple", "price": 1}]'


@pytest.mark.parametrize(
    ("message", "reason", "text", "mapping"),
    [
        (
            {"role": "user", "utterance": "Hi"},
            "unknown_key",
            r"message 0 \(user\) has no text under content, but it has 'Hi' under 'utterance', a key that is not known",
            {"message_keys": {"utterance": "content"}},
        ),
        (
            {"role": "assistant", "content": "", "reply": "Hello"},
            "unknown_key",
            "under 'reply'",
            {"message_keys": {"reply": "content"}},
        ),
        (
            {"speaker": "human", "content": "Hi"},
            "unknown_role",
            "message 0 has no role; .* its key 'speaker' may be the role",
            {"message_keys": {"speaker": "role"}},
        ),
        ({"role": "kunde", "content": "Hi"}, "unknown_role", "role 'kunde'", {"roles": {"kunde": ""}}),
        (
            {"role": "user", "content": [{"type": "text", "body": "Hi"}]},
            "content_not_text",
            "message 0 has a part of type 'text' with 'body' and no text",
            {},
        ),
        (
            {"role": "user", "content": [{"type": "widget", "body": "Hi"}]},
            "content_not_text",
            r"a part of type 'widget' with \['body'\]; known are text, reasoning",
            {},
        ),
    ],
)
def test_a_key_that_is_not_known_is_named(
    message: dict[str, Any], reason: str, text: str, mapping: dict[str, Any]
) -> None:
    with pytest.raises(RowError, match=text) as caught:
        normalize({"messages": [message]}, detect_layout(["messages"]))
    assert (caught.value.reason, caught.value.mapping) == (reason, mapping)


def test_tools_in_a_column_and_others_in_a_message_are_refused() -> None:
    parts = [{"type": "tools", "value": json.dumps([TOOL])}]
    other = {"name": "other"}
    row = {"messages": [{"role": "system", "content": parts}, USER, FINAL], "tools": [other]}
    with pytest.raises(RowError, match="tools in a column and others in a message"):
        record_of(row)
    row["tools"] = [TOOL]
    assert record_of(row)["messages"] == [USER, FINAL]


def test_a_user_may_speak_after_a_result_as_in_anthropics_form() -> None:
    result = [{"type": "tool_result", "tool_use_id": "c1", "content": "grey"}, {"type": "text", "text": "And now?"}]
    record = record_of({"messages": [USER, asked(id="c1"), {"role": "user", "content": result}, FINAL]})
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "user", "assistant"]


def test_calls_in_the_text_are_followed_by_results() -> None:
    called = {"role": "assistant", "content": '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'}
    assert record_of({"messages": [USER, called, {"role": "tool", "content": "grey"}, FINAL]})["messages"][1] == called


def test_reasoning_without_an_answer_is_not_called_empty() -> None:
    for content in ("", None):
        record = normalize({"messages": [USER, {**FINAL, "content": content, "reasoning": "Hm."}]}, LAYOUT)
        assert validate_record(record) == [("empty_answer", "message 1 (assistant) has reasoning, but no answer")]


def test_spans_of_a_message_are_not_ignored() -> None:
    spans = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    with pytest.raises(RowError, match="message 1: training_detail trains a part of a message"):
        normalize({"messages": [USER, {**FINAL, "training_detail": spans}]}, LAYOUT)


@pytest.mark.parametrize("tools", ["null", "[]", "", None, []])
def test_no_tools(tools: Any) -> None:
    assert record_of({"messages": [USER, FINAL], "tools": tools}) == {"messages": [USER, FINAL]}
