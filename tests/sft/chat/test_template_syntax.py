"""Templates that only print texts are rendered once, with marks, and give the same turns as two renderings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.chat import said
from sft.chat.formats import FORMATS
from sft.chat.render import ChatRenderer
from sft.chat.template_syntax import only_prints_contents
from tests.tiny import tiny_tokenizer

LOOP = "{% for message in messages %}<m>{BODY}</m>{% endfor %}"


@pytest.mark.parametrize(
    "body",
    [
        "{{ message['content'] }}",
        "{{ '<' + message.role + '>' + message.content | trim + eos_token }}",
        "{{ message.content if message.content is string else '' }}",
        "{% if message['content'] and not loop.last %}{{ message['content'] }}{% endif %}",
        "{% if message['role'] == 'user' %}{{ 'Q: ' ~ message['content'] }}{% endif %}",
        "{% if loop.previtem.role != 'user' %}{{ messages | length }}{{ messages[0]['content'] }}{% endif %}",
        "{% set m = messages[loop.index0] %}{{ m.content or 'nothing' }}",
    ],
)
def test_templates_that_only_print_are_recognized(body: str) -> None:
    assert only_prints_contents(LOOP.replace("{BODY}", body))


@pytest.mark.parametrize(
    "body",
    [
        "{{ message['content'] | upper }}",
        "{{ message['content'][0] }}",
        "{{ message['content'].strip() }}",
        "{{ message.get('content') }}",
        "{{ message | tojson }}",
        "{{ messages }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ message['content'] * 2 }}",
        "{% if 'x' in message['content'] %}x{% endif %}",
        "{% if message['content'] == 'x' %}x{% endif %}",
        "{% if message['content'] | length > 3 %}x{% endif %}",
        "{% set text = message['content'] %}{{ text }}",
        "{% set text %}{{ message['content'] }}{% endset %}{{ text | upper }}",
        "{% filter upper %}{{ message['content'] }}{% endfilter %}",
        "{% macro show(m) %}{{ m.content }}{% endmacro %}{{ show(message) }}",
        "{% macro show() %}{{ message.content }}{% endmacro %}{{ show() | upper }}",
        "{% set key = 'content' %}{{ message[key] | upper }}",
        "{% for key in message %}{{ message[key] }}{% endfor %}",
        "{% for key, value in message.items() %}{{ value }}{% endfor %}",
        "{% for letter in message['content'] %}{{ letter }}{% endfor %}",
        "{% set message = 'x' %}{{ message }}",
        "{% if loop.changed(message['content']) %}x{% endif %}",
        "{% if loop.nextitem['content'] == 'x' %}x{% endif %}",
        "{% set ns = namespace(m=message) %}{{ ns.m.content | upper }}",
        "{% set ns.text = message['content'] %}",
        "{% with text = message['content'] %}{{ text | upper }}{% endwith %}",
        "{% if messages[-1].content is equalto 'x' %}x{% endif %}",
        "{% endfor",
    ],
)
def test_any_other_use_of_a_text_counts_as_inspecting_it(body: str) -> None:
    assert not only_prints_contents(LOOP.replace("{BODY}", body))


def test_most_named_formats_only_print() -> None:
    assert {name for name, each in FORMATS.items() if only_prints_contents(each.template)} >= {
        *("chatml", "llama3", "zephyr", "gemma", "phi3", "mistral"),
    }


TEXT = st.text(st.sampled_from("ab \n.{<|im_end|>\U000f0001é"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_turns_are_those_of_rendering_twice(name: str, pairs: list[tuple[str, str]], is_asked: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORMATS[name].template
    messages = [
        {"role": role, "content": text or "?" * is_asked}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    once = rendered(tokenizer, messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(said, "only_prints_contents", lambda source: False)
        assert once == rendered(tokenizer, messages)


def rendered(tokenizer: object, messages: list[dict[str, str]]) -> object:
    try:
        return ChatRenderer(tokenizer).render({"messages": messages})
    except ValueError as error:
        return str(error)
