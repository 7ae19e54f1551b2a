"""Texts of records are found with their places, and can be replaced."""

from __future__ import annotations

from sft.data.contents import contents, with_texts

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CHAT = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "Rain"},
        {"role": "assistant", "content": "Rain."},
    ],
    "tools": "[]",
}


def test_all_texts_are_found_with_their_roles() -> None:
    found = [(content.place, content.text, content.is_answer) for content in contents(CHAT)]
    assert found == [
        ("message 0 (user)", "What is this?", False),
        ("message 1 (assistant, reasoning_content)", "Hm.", False),
        ("message 1 (assistant)", "", True),
        ("message 1 (assistant, tool_calls)", '{"city": "Oslo"}', False),
        ("message 2 (tool, name)", "weather", False),
        ("message 2 (tool)", "Rain", False),
        ("message 3 (assistant)", "Rain.", True),
        ("tools", "[]", False),
    ]
    pair = {"prompt": "a", "completion": "b"}
    assert [(content.place, content.is_answer) for content in contents(pair)] == [
        ("prompt", False),
        ("completion", True),
    ]
    messages = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert [content.place for content in contents(messages)] == [
        "prompt message 0 (user)",
        "completion message 0 (assistant)",
    ]


def test_texts_are_replaced_in_a_copy() -> None:
    shouted = with_texts(CHAT, {content.path: content.text.upper() for content in contents(CHAT)})
    assert [content.text for content in contents(shouted)] == [content.text.upper() for content in contents(CHAT)]
    assert CALL["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
