"""A turn begins where generation begins, and contains all that the model has to generate."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft.chat.render import ChatRenderer, render
from tests.tiny import tiny_tokenizer

CALL = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Lima", "days": 3})}}
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|im_start|>assistant analysis:{{ m.thinking }}<|im_end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|im_start|>assistant to={{ c.function.name }}:"
    "{{ c.function.arguments | tojson }}<pad>{% endfor %}"
    "{% if m.content %}<|im_start|>assistant final:{{ m.content }}<|endoftext|>{% endif %}"
    "{% else %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# The generation prompt has an empty block of thoughts; history has none, and the last turn always one.
NO_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if not (enable_thinking | default(false)) %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def trained(messages: list[dict[str, Any]], template: str) -> list[str]:
    rendered = render({"messages": messages}, tiny_tokenizer(template))
    return [rendered.text[start:end] for start, end, _ in rendered.spans]


def test_all_channels_of_a_turn_are_trained() -> None:
    messages = [user("2+2?"), assistant("4", thinking="add them"), user("3+3?"), assistant("6", thinking="again")]
    assert trained(messages, CHANNELS) == [
        " analysis:add them<|im_end|><|im_start|>assistant final:4<|endoftext|>",
        " analysis:again<|im_end|><|im_start|>assistant final:6<|endoftext|>",
    ]


def test_thoughts_calls_and_a_later_answer_are_turns_of_their_own() -> None:
    messages = [
        user("Rain?"),
        assistant("", thinking="ask", tool_calls=[CALL]),
        {"role": "tool", "content": "rain"},
        assistant("Rain.", thinking="seen"),
    ]
    assert trained(messages, CHANNELS) == [
        ' analysis:ask<|im_end|><|im_start|>assistant to=weather:{"city": "Lima", "days": 3}<pad>',
        " analysis:seen<|im_end|><|im_start|>assistant final:Rain.<|endoftext|>",
    ]


def test_an_empty_block_of_the_prompt_that_history_lacks_is_resolved() -> None:
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    assert trained(messages, NO_THOUGHTS) == ["4<|im_end|>", "6<|im_end|>"]


def test_thoughts_after_a_prompt_that_closes_them_are_refused_with_the_way_out() -> None:
    messages = [user("2+2?"), assistant("4", reasoning_content="add")]
    with pytest.raises(ValueError, match=r'does not begin where.*chat_template_kwargs to \{"enable_thinking": true\}'):
        render({"messages": messages}, tiny_tokenizer(NO_THOUGHTS))
    record = {"messages": messages, "chat_template_kwargs": '{"enable_thinking": true}'}
    rendered = render(record, tiny_tokenizer(NO_THOUGHTS))
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == ["add\n</think>\n\n4<|im_end|>"]


def test_only_trained_turns_have_to_begin_where_generation_begins() -> None:
    messages = [user("2+2?"), assistant("4", reasoning_content="add"), user("3+3?"), assistant("6")]
    renderer = ChatRenderer(tiny_tokenizer(NO_THOUGHTS), not_printed="warn")
    rendered = renderer.render({"messages": [messages[0], {**messages[1], "train": False}, *messages[2:]]})
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == ["6<|im_end|>"]


def test_content_that_is_printed_after_the_result_of_its_call_is_trained_there() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if loop.index0 and messages[loop.index0 - 1].role != 'tool' %}<|im_start|>assistant\n{% endif %}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]<pad>"
        "{% if loop.last and m.tool_result is not defined %}{% endif %}{% endfor %}"
        "{% if m.tool_calls and not loop.last %}({{ loop.nextitem.content }}){% endif %}"
        "{{ m.content }}{% if not m.tool_calls %}<|im_end|>\n{% endif %}"
        "{% elif m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        user("Rain?"),
        assistant("Let me see.", tool_calls=[CALL]),
        {"role": "tool", "content": "rain"},
        assistant("Rain."),
    ]
    rendered = render({"messages": messages}, tiny_tokenizer(template))
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == [
        '[weather {"city": "Lima", "days": 3}]<pad>',
        "Let me see.",
        "Rain.<|im_end|>",
    ]
