"""Rows of every layout are converted to the right record; the error for an invalid row states the reason."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from sft.data.contents import contents
from sft.data.messages import RowError, validate_record
from sft.data.records import (
    Kind,
    Layout,
    detect_layout,
    normalize,
    record_digest,
)

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages"], Kind.MESSAGES),
        (["id", "conversations", "system"], Kind.MESSAGES),
        (["prompt", "prompt_id", "messages"], Kind.MESSAGES),
        (["instruction", "input", "output"], Kind.MESSAGES),
        (["question", "answer"], Kind.MESSAGES),
        (["prompt", "completion"], Kind.PROMPT_COMPLETION),
        (["text", "label"], Kind.TEXT),
        (["input_ids", "labels", "text"], Kind.TOKENIZED),
    ],
)
def test_kind_follows_from_the_columns(columns: list[str], kind: Kind) -> None:
    assert detect_layout(columns).kind is kind


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(ValueError, match=r"\['body', 'title'\] are none of: messages"):
        detect_layout(["title", "body"])


def test_columns_in_capitals_are_refused_with_their_new_names() -> None:
    with pytest.raises(ValueError, match=r"rename ' Question' to 'question', 'Answer' to 'answer'"):
        detect_layout([" Question", "Answer"])


def test_kind_is_decided_from_all_rows_not_from_the_first() -> None:
    rows = [{"instruction": "Add", "output": "3"}, {"instruction": "Add", "input": "1 2", "output": "3"}]
    layout = detect_layout({name for row in rows for name in row})
    assert layout == Layout(Kind.MESSAGES, ("instruction", "output"), context="input")
    assert [normalize(row, layout)["messages"][0]["content"] for row in rows] == ["Add", "Add\n\n1 2"]


def test_alpaca_rows_become_conversations() -> None:
    row = {
        "system": "Be exact.",
        "instruction": "Translate",
        "input": "",
        "output": "Bonjour",
        "history": [["Hello?", "Yes?"]],
    }
    assert normalize(row, detect_layout(row)) == {
        "messages": [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Translate"},
            {"role": "assistant", "content": "Bonjour"},
        ]
    }


def test_share_gpt_turns_become_messages() -> None:
    row = {
        "system": "Help.",
        "conversations": [
            {"from": "human", "value": "Weather in Lima?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Lima"}}'},
            {"from": "observation", "value": '{"sky": "grey"}'},
            {"from": "gpt", "value": "Grey."},
        ],
        "tools": '[{"name": "weather", "parameters": {"type": "object"}}]',
    }
    record = normalize(row, Kind.MESSAGES)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    assert record["messages"] == [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Weather in Lima?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "Grey."},
    ]
    expected = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert json.loads(record["tools"]) == expected


def test_openai_messages_keep_calls_flags_and_names() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [1, {"z": 2}]}}}
    row = {
        "messages": [
            {"role": "developer", "content": "Short.", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0.5},
            {"role": "tool", "content": {"r": 1}, "tool_call_id": "c1"},
            {"role": "assistant", "content": "Done", "train": False, "reasoning_content": "hm"},
        ]
    }
    function = {"name": "f", "arguments": '{"x": null, "y": [1, {"z": 2}]}'}
    expected = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "weight": 0.5,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": '{"r": 1}', "tool_call_id": "c1"},
        {"role": "assistant", "content": "Done", "train": False, "reasoning_content": "hm"},
    ]
    assert normalize(row, Kind.MESSAGES) == {"messages": expected}


def test_nulls_that_arrow_wrote_into_schemas_and_arguments_are_removed() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "other": None}}}
    row = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "integer", "enum": None}}}}
        ],
    }
    record = normalize(row, Kind.MESSAGES, prune_nulls=True)
    assert record["messages"][0]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'
    assert json.loads(record["tools"])[0]["function"]["parameters"] == {"x": {"type": "integer"}}


def test_conversations_and_tools_may_be_json_text() -> None:
    row = {"messages": json.dumps(ASKED), "tools": ['{"name": "f"}']}
    record = normalize(row, Kind.MESSAGES)
    assert record == {"messages": ASKED, "tools": '[{"type": "function", "function": {"name": "f"}}]'}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, {"prompt": ASKED[:1], "completion": ASKED[1:]}),
        ({"prompt": ASKED[:1], "completion": "Hello"}, {"prompt": ASKED[:1], "completion": ASKED[1:]}),
        ({"prompt": "Hi", "completion": ASKED[1:]}, {"prompt": ASKED[:1], "completion": ASKED[1:]}),
        ({"text": "once", "other": 1}, {"text": "once"}),
        ({"input_ids": [1, 2], "labels": [1, 2], "x": 1}, {"input_ids": [1, 2], "labels": [1, 2]}),
        (
            {"messages": ASKED, "chat_template_kwargs": {"enable_thinking": False}},
            {"messages": ASKED, "chat_template_kwargs": '{"enable_thinking": false}'},
        ),
    ],
)
def test_other_kinds(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert normalize(row, detect_layout(row)) == expected


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"messages": None}, "missing_column", r"no value in \['messages'\]"),
        ({"messages": []}, "no_messages", "no message"),
        ({"messages": "hello"}, "bad_messages", "not JSON"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "unknown_role",
            "message 0 has role 'wizard'; use system, user, assistant or tool$",
        ),
        ({"messages": [{"content": "x"}]}, "unknown_role", "message 0 has no role; use"),
        ({"messages": [{"role": "user", "content": 3}]}, "content_not_text", r"message 0 \(user\) has content 3"),
        ({"messages": [{"role": "user", "content": None}]}, "content_not_text", "content null, text"),
        ({"messages": ["x"]}, "bad_messages", "a list of messages is needed"),
        ({"conversations": [{"from": "function_call", "value": "f("}]}, "bad_tool_call", "not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "bad_tool_call", "names no function"),
        ({"messages": ASKED, "tools": "{"}, "bad_tools", "not JSON"),
        ({"messages": ASKED, "tools": [{"description": "f"}]}, "bad_tools", "names no function"),
        ({"prompt": 1, "completion": "x"}, "not_text", "'prompt' holds int 1"),
        ({"instruction": "x", "output": None}, "missing_column", r"\['output'\]"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "bad_history", "pairs"),
        ({"text": 5}, "not_text", "int 5"),
        ({"input_ids": [1], "labels": [1, 2]}, "token_lengths", "differ in length"),
        ({"input_ids": False}, "token_type", "input_ids must be a list of numbers, not bool"),
        ({"input_ids": [1], "labels": "1"}, "token_type", "labels must be a list of numbers, not str"),
    ],
)
def test_a_row_that_does_not_fit_says_what_was_found(row: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        normalize(row, detect_layout(row))
    assert caught.value.reason == reason


def test_a_row_of_another_kind_than_its_data_set_is_named() -> None:
    with pytest.raises(RowError, match="of kind messages, this row of kind text"):
        normalize({"text": "x"}, Kind.MESSAGES)


@pytest.mark.parametrize(
    ("roles", "reasons"),
    [
        ("user assistant", []),
        ("system user assistant user assistant", []),
        ("user call tool tool assistant", []),
        ("user call tool call tool assistant user assistant", []),
        ("user user assistant", ["wrong_order"]),
        ("assistant user assistant", ["wrong_order"]),
        ("user system assistant", ["wrong_order"]),
        ("user call assistant", ["wrong_order"]),
        ("user assistant user", ["no_final_answer"]),
        ("user call", []),
        ("system user", ["no_answer"]),
    ],
)
def test_order_of_roles(roles: str, reasons: list[str]) -> None:
    messages = []
    for role in roles.split():
        if role == "call":
            messages.append({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]})
        else:
            messages.append({"role": role, "content": "x"})
    problems = validate_record({"messages": messages})
    assert [problem.reason for problem in problems] == reasons
    relaxed = validate_record({"messages": messages}, require_alternation=False)
    assert [problem.reason for problem in relaxed] == (["no_answer"] if reasons == ["no_answer"] else [])


@pytest.mark.parametrize(
    ("record", "reasons"),
    [
        ({"messages": [ASKED[0], {"role": "assistant", "content": " \n"}]}, ["empty_answer"]),
        ({"messages": [{"role": "user", "content": ""}, ASKED[1]]}, ["empty_content"]),
        ({"messages": [ASKED[0], {**ASKED[1], "train": "no"}]}, ["bad_flag"]),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": -1}]}, ["bad_flag"]),
        ({"prompt": "", "completion": "x"}, []),
        ({"prompt": "x", "completion": " "}, ["empty_answer"]),
        ({"prompt": ASKED, "completion": [{"role": "user", "content": "x"}]}, ["no_final_answer", "wrong_order"]),
        ({"text": "\n"}, ["empty_text"]),
        ({"text": "x"}, []),
        ({"input_ids": []}, ["empty_text"]),
    ],
)
def test_contents_and_flags(record: dict[str, Any], reasons: list[str]) -> None:
    assert [problem.reason for problem in validate_record(record)] == reasons


def test_digest_depends_on_content_only() -> None:
    assert record_digest({"id": "a:1", "text": "x"}) == record_digest({"text": "x", "id": "b:2"})
    assert record_digest({"text": "x"}) != record_digest({"text": "y"})
    with pytest.raises(RowError, match="surrogate"):
        record_digest({"text": "\ud83d"})


def test_a_system_column_that_contradicts_the_conversation_is_an_error() -> None:
    messages = [{"role": "system", "content": "A."}, {"role": "user", "content": "x"}]
    layout = detect_layout(["messages", "system"])
    assert normalize({"messages": messages, "system": "A."}, layout) == {"messages": messages}
    with pytest.raises(RowError, match=r"the conversation has one, and column 'system' holds 'B\.'"):
        normalize({"messages": messages, "system": "B."}, layout)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "content_not_text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]}, "bad_tool_call"),
        ({"question": "a", "answer": "b", "history": 5}, "bad_history"),
        ({"question": "a", "answer": "b", "history": [5]}, "bad_history"),
        ({"question": "a", "answer": "b", "chat_template_kwargs": "no JSON"}, "bad_template_kwargs"),
        ({"question": "a", "answer": "b", "chat_template_kwargs": [1]}, "bad_template_kwargs"),
    ],
)
def test_values_of_odd_types_are_faults_of_the_row(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        normalize(row, detect_layout(row))
    assert error.value.reason == reason


def test_rows_of_any_json_become_a_record_or_a_reason() -> None:
    rng = random.Random(0)
    odd = [
        None,
        True,
        5,
        0.5,
        "x",
        "[1]",
        "{}",
        [],
        {},
        [[]],
        [{}],
        {"name": "f"},
        [{"role": "user"}],
        [{"type": "text"}],
    ]
    for _ in range(5000):
        message = {
            key: rng.choice(odd) for key in ("role", "content", "tool_calls", "train", "weight", "function_call")
        }
        message["role"] = rng.choice(["user", "assistant", "tool", "function_call", message["role"]])
        row = {name: rng.choice(odd) for name in ("system", "tools", "chat_template_kwargs")}
        row |= rng.choice(
            [
                {"messages": rng.choice([[message], [message] * 2, rng.choice(odd)])},
                {"prompt": rng.choice([*odd, [message]]), "completion": rng.choice([*odd, [message]])},
                {"question": rng.choice(odd), "answer": rng.choice(odd), "history": rng.choice([*odd, [["a", "b"]]])},
                {"text": rng.choice(odd)},
            ]
        )
        try:
            record = normalize(row, detect_layout(row))
        except RowError:
            continue
        assert all(isinstance(problem.reason, str) for problem in validate_record(record))
        assert all(isinstance(content.text, str) for content in contents(record))
