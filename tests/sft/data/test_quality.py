"""Checks of quality find faults, and report nothing for text that is merely unusual."""

from __future__ import annotations

from typing import Any

import pytest

from sft.data.quality import (
    FINDERS,
    control_characters,
    mojibake,
    truncated_answer,
    without_control_characters,
    without_mojibake,
)

PROSE = (
    "The first sentence is here. The second one follows it at once! A third one makes this long enough to be prose. "
)


def answer(text: str, question: str = "Why?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("Use this:\n```python\nprint(1)\n", "ends inside a code block"),
        ('{"intent": "order", "items": ["3 x mu', "ends inside JSON"),
        ('{"intent": "order",', "ends inside JSON"),
        ('[{"a": 1}', "ends inside JSON"),
        ("There are three things that one must know before it:", "ends in ':'"),
        (PROSE * 2 + "And then, when all of them had gone home, the old man sat down and", "the midst of a sentence"),
    ],
)
def test_answers_that_break_off_are_found(text: str, sign: str) -> None:
    problem = truncated_answer(answer(text))
    assert problem is not None
    assert problem.reason == "truncated_answer"
    assert problem.detail.startswith("message 1 (assistant) ")
    assert sign in problem.detail


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "yes",
        ":(",
        "```python\nprint(1)\n```",
        '{"a": [1, 2]}',
        "[1] Smith, On Things, page 3",
        "{x} is a set",
        "[" * 100_000 + ".",
        "- apples\n- pears\n- a very long line about oranges, which ends without a full stop since it is in a list",
        PROSE * 2 + "More of all this is to be read, for whoever wants to, at https://example.org/a/long/address",
        PROSE * 3,
    ],
)
def test_answers_that_are_merely_short_or_odd_are_not(text: str) -> None:
    assert truncated_answer(answer(text)) is None


def test_questions_may_break_off() -> None:
    assert truncated_answer(answer("Yes.", question='{"a": [1,')) is None
    assert truncated_answer({"prompt": "```", "completion": "x"}) is None
    assert truncated_answer({"prompt": "x", "completion": '{"a": '}) is not None


def test_wrongly_decoded_text_is_found_and_put_right() -> None:
    broken = answer("A café, naïve".encode().decode("cp1252"))
    problem = mojibake(broken)
    assert problem is not None
    assert "message 1 (assistant) reads as if it was decoded wrongly: 'A cafÃ©, naÃ¯ve'" in problem.detail
    assert without_mojibake(broken) == answer("A café, naïve")
    lost = mojibake(answer("A caf\ufffd"))
    assert lost is not None
    assert "U+FFFD" in lost.detail


@pytest.mark.parametrize("text", ["A café", "Übergröße", "日本語のテキスト", "Привет", "👩‍💻 it’s “fine” – 5 €"])
def test_text_of_any_language_is_not_mojibake(text: str) -> None:
    assert mojibake(answer(text)) is None
    assert control_characters(answer(text)) is None


@pytest.mark.parametrize(
    ("text", "name", "clean"),
    [
        ("a\x00b", "U+0000", "ab"),
        ("a\x1b[31mb", "U+001B", "a[31mb"),
        ("a\ufeffb", "U+FEFF", "ab"),
        ("a\u202eb", "U+202E", "ab"),
        ("a\U000e0041\U000e0042b", "U+E0041", "ab"),
    ],
)
def test_invisible_characters_are_found_and_removed(text: str, name: str, clean: str) -> None:
    problem = control_characters(answer("Yes.", question=text))
    assert problem is not None
    assert f"message 0 (user) holds {name}: " in problem.detail
    assert without_control_characters(answer("Yes.", question=text)) == answer("Yes.", question=clean)


def test_line_ends_tabs_and_flags_are_not_control_characters() -> None:
    scotland = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
    assert control_characters(answer(f"a\tb\r\nc {scotland}")) is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Dear {{ user.name }},", "{{ user.name }}"),
        ("Write <your text here>.", "<your text here>"),
        ("I am [Your Name].", "[Your Name]"),
        ("See <placeholder>.", "<placeholder>"),
        ("In Jinja:\n```\n{{ name }}\n```", None),
        (r"\frac{{ab}}{{cd}} and x^{{ab}}", None),
        ("<b>your</b> [your page](https://a.b) {name}", None),
    ],
)
def test_placeholders_that_were_not_filled_in(text: str, place: str | None) -> None:
    problem = FINDERS["placeholder"]({"messages": [{"role": "assistant", "content": text}]})
    assert problem == (
        None
        if place is None
        else ("placeholder", f"message 0 (assistant) holds {place!r}, a place that was not filled in")
    )
