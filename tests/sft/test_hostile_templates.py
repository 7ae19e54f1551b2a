"""Chat templates are programs that come with data and models: they may do no harm, and they are stopped in time."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.chat.template import ChatTemplate
from sft.untrusted import templates
from sft.untrusted.child import Child

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "FIRST_CHAT_S", 0.3)


def test_a_template_with_an_endless_loop_is_stopped_with_a_message(short_limit: None) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"takes more than 0\.4 s for 1 conversations"):
        ChatTemplate(LONG, VARIABLES).render([CHAT])
    assert time.monotonic() - started < 5


def test_a_template_that_prints_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 1000)
    with pytest.raises(ValueError, match="made 2000 characters of one conversation"):
        ChatTemplate("{{ 'ab' * 1000 }}", VARIABLES).render([CHAT])


GIANT_NUMBERS = [
    "{{ 10 ** (10 ** 9) }}",
    "{{ 1|round(-1000000000) }}",
    "{{ 1.5|round(1000000000, 'ceil') }}",
    "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
]
GIANT_TEXTS = [
    "{{ 'ab' * 10 ** 11 }}",
    "{{ 'a'|center(10 ** 12) }}",
    "{{ '%999999999999d' % 1 }}",
    "{{ '{:>999999999999}'.format(1) }}",
    "{{ 'a'|indent(10 ** 12, true) }}",
    "{% set x = 'a' * 10 ** 8 %}{% for i in range(10000) %}{{ x }}{% endfor %}",
]


@pytest.mark.parametrize("source", GIANT_NUMBERS)
def test_a_number_that_would_take_hours_is_refused_at_once(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="the chat template refused the conversation: "):
        ChatTemplate(source, VARIABLES).render([CHAT])
    assert time.monotonic() - started < 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded on Linux alone")
@pytest.mark.parametrize("source", GIANT_TEXTS)
def test_a_text_that_would_fill_the_memory_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="the chat template takes more than 2 GiB of memory"):
        ChatTemplate(source, VARIABLES).render([CHAT])


NESTED = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}"
)


@pytest.mark.parametrize(
    "use",
    [
        "{{ n.x == n.y }}",
        "{{ n.x in [n.y] }}",
        "{{ [n.x, n.y]|sort }}",
        "{{ [n.x, n.y]|unique|list }}",
        "{{ [n.x, n.y]|max }}",
        "{{ n.x|tojson }}",
        "{{ n.x|string|length }}",
        "{{ n.x|pprint }}",
        "{{ '%s' % [n.x] }}",
        "{{ '{}'.format(n.x) }}",
    ],
)
def test_nested_lists_that_share_their_elements_are_stopped(short_limit: None, use: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"the chat template (takes more than|refused)"):
        ChatTemplate(NESTED + use, VARIABLES).render([CHAT])
    assert time.monotonic() - started < 30


def test_hashing_nested_tuples_is_stopped(short_limit: None) -> None:
    build = "{% set n = namespace(x=()) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
    source = build + "{{ {n.x: 1}|length }}"
    with pytest.raises(ValueError, match=r"takes more than 0\.4 s for 1 conversations"):
        ChatTemplate(source, VARIABLES).render([CHAT])


def test_a_template_works_after_another_was_stopped(short_limit: None) -> None:
    with pytest.raises(ValueError, match="takes more than"):
        ChatTemplate(LONG, VARIABLES).render([CHAT])
    assert ChatTemplate("{{ messages[0].content }}", VARIABLES).render([CHAT]) == ["Hello"]


def test_many_chats_in_one_call_are_rendered_as_one_by_one() -> None:
    refuse = "{{ raise_exception('no') if messages[0].content == 'bad' else messages[0].content }}"
    source = refuse + "{{ tools|length if tools else '' }}"
    chats = [
        ([{"role": "user", "content": text}], tools) for text, tools in (("a", None), ("bad", None), ("\ud800", [{}]))
    ]
    assert ChatTemplate(source, VARIABLES).render_each(chats) == ["a", None, "\ud8001"]


def test_the_child_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    child = Child()
    environment = child.call(environment_names, seconds=10)
    child.close()
    assert "AWS_SECRET_ACCESS_KEY" not in environment
    assert "PATH" in environment


def environment_names() -> list[str]:
    return sorted(os.environ)


def test_ordinary_arithmetic_of_templates_still_works() -> None:
    source = "{{ 2 ** 10 }} {{ 7 // 2 }} {{ 'ab' * 2 }} {{ 'a%s' % 'b' }} {{ 2.57|round(1) }} {{ 4 ** 0.5 }}"
    assert ChatTemplate(source, VARIABLES).render([CHAT]) == ["1024 3 abab ab 2.6 2.0"]


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 // 0 }}",
        "{{ messages[7]['content'].missing.deeper }}",
        "{{ range(10 ** 9) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{% break %}",
    ],
)
def test_templates_that_misbehave_are_refused_in_one_message(source: str) -> None:
    with pytest.raises(ValueError, match="the chat template"):
        print(ChatTemplate(source, VARIABLES).render([CHAT]))


EXPRESSIONS = ["m", "m['content']", "messages", "loop.index", "[0]", "range(3)", "f()", "namespace()", "trim", "tojson"]
STATEMENTS = ["{% for m in messages %}", "{% endfor %}", "{% if ", "{% endif %}", "{% set x = ", "{% macro f() %}"]
SIGNS = ["{{ ", " }}", " %}", "{#", "#}", "{%- ", "{% endmacro %}", "{% break %}", *"()+-*/~|'x10\n"]
PIECES = st.sampled_from([*EXPRESSIONS, *STATEMENTS, *SIGNS])
SOURCES = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=12).map("".join))


def check_any_template(source: str, contents: list[Any]) -> None:
    """A template prints texts or is refused with a ValueError."""
    chat = [{"role": "user", "content": content} for content in contents]
    message = None
    try:
        texts = ChatTemplate(source, VARIABLES).render([chat])
    except ValueError as error:
        message = str(error)
    if message is None:
        assert [type(text) for text in texts] == [str]
    else:
        assert "chat template" in message


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.lists(st.one_of(st.none(), st.text(max_size=9), st.integers()), max_size=3))
def test_any_template_prints_or_is_refused(source: str, contents: list[Any]) -> None:
    check_any_template(source, contents)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(SOURCES, st.lists(st.one_of(st.none(), st.text(max_size=9), st.integers()), max_size=3))
def test_any_of_many_templates_prints_or_is_refused(source: str, contents: list[Any]) -> None:
    check_any_template(source, contents)
