"""Check that a chat template prints everything that a chat says.

1. What stands between its marks in the rendered chat as it is, or as JSON or Python write it, is printed.
2. For the rest, the chat is rendered again with every word of these texts replaced by a word that occurs once. Tags and
   punctuation stay, so that the template takes the same way through its branches. The words that appear are printed.
   A long text that the chat has as often as it is said counts as printed, too.
3. A number or truth value must follow its key; else the chat is rendered with another value, and the text must change.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from sft.chat.said import TAG, Kind, MarkedText, Said, rewrite, speech_keys
from sft.chat.template import ChatTemplate, Messages

_WORD = re.compile(rf"(?P<tag>{TAG.pattern})|\w+")
_LONG = 12
"""Characters of a text that stands nowhere by chance."""
_LITERALS: dict[bool | None, tuple[str, ...]] = {
    True: ("true", "True"),
    False: ("false", "False"),
    None: ("null", "None"),
}


class Unprinted(NamedTuple):
    """Something that a chat says and the template does not print.

    Args:
        said: What it is, and where in the chat.
        lost: The part of it that is not printed.
    """

    said: Said
    lost: str


def unprinted(
    template: ChatTemplate, messages: Messages, tools: list[Any] | None, text: str, marked: MarkedText | None
) -> list[Unprinted]:
    """List what a chat says and its rendered text does not contain.

    Args:
        template: The template.
        messages: Messages as `sft.chat.template.template_messages` returns them.
        tools: Tool schemas.
        text: The rendered chat.
        marked: The same with the places of what is said, from `sft.chat.said.render_with_marks`.
    """
    keys = speech_keys(messages, template.source)
    said: list[Said] = []
    if marked is None:
        rewrite(messages, keys, lambda item: said.append(item) or item.value)  # type: ignore[func-returns-value]
        doubtful = list(range(len(said)))
    else:
        said = marked.said
        doubtful = [number for number in range(len(said)) if not _is_shown(number, marked)]
    if not doubtful:
        return []
    check = _Replacement(template, messages, tools, keys, text)
    lost = check.lost_words(said, [number for number in doubtful if said[number].is_text])
    for number in doubtful:
        if not said[number].is_text and not check.changes_text(number, said[number].value):
            lost[number] = json.dumps(said[number].value, default=str)
    lost = {number: part for number, part in lost.items() if not _is_named_by_id(said[number], messages, text)}
    return [Unprinted(said[number], lost[number]) for number in sorted(lost)]


def _is_named_by_id(item: Said, messages: Messages, text: str) -> bool:
    """Return whether a call is printed with an id that contains the function's name, such as `functions.search:0`."""
    if item.kind is not Kind.NAME:
        return False
    name = str(messages[item.message]["tool_calls"][item.path[1]].get("id", ""))
    num_results = sum(message.get("tool_call_id") == name for message in messages)
    return item.value in name and text.count(name) > num_results


def _is_shown(number: int, marked: MarkedText) -> bool:
    item, inner = marked.said[number], marked.inner[number]
    if item.is_text:
        return inner is not None and any(_is_same(inner, shown) for shown in marked.shown.get(number, ()))
    if item.value in ("", [], {}):
        return True  # nothing to print besides the key, which is checked by itself
    key = _key_of(item, number, marked.said)
    return key is not None and any(_contains(region, item.value) for region in marked.after(key))


def _is_same(text: str, shown: str) -> bool:
    return shown == text or shown.split() == text.split() or shown in _spellings(text)


def _spellings(text: str) -> Iterator[str]:
    """Yield a text as templates escape it: in JSON, in ASCII JSON, in JSON inside JSON, as Python or HTML."""
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1]
    yield repr(text)[1:-1]
    yield text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    yield text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")


def _key_of(item: Said, number: int, said: list[Said]) -> int | None:
    """Return the number of the key that a value belongs to, directly or as an item of its list."""
    for before in range(number - 1, -1, -1):
        other = said[before]
        if other.message != item.message:
            return None
        if other.kind is Kind.KEY and item.path[: len(other.path)] == other.path:
            return before
    return None


def _contains(region: str, value: Any) -> bool:
    is_literal = value is None or isinstance(value, bool)
    spellings = _LITERALS[value] if is_literal else (json.dumps(value, default=str), str(value))
    return any(re.search(rf"(?<![\w.]){re.escape(spelling)}(?!\w)", region) for spelling in spellings)


class _Replacement:
    """Renderings of a chat in which some of what it says is replaced."""

    def __init__(
        self, template: ChatTemplate, messages: Messages, tools: list[Any] | None, keys: frozenset[str], text: str
    ) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._keys = keys
        self._text = text

    def _render(self, new: dict[int, Any]) -> str | None:
        numbers = itertools.count()
        chat = rewrite(self._messages, self._keys, lambda item: new.get(next(numbers), item.value))
        try:
            return self._template.render([chat], self._tools)[0]
        except ValueError:
            return None

    def lost_words(self, said: list[Said], numbers: list[int]) -> dict[int, str]:
        """Return, by number, the part of each text from its first word that is not printed."""
        count = itertools.count(1)
        words = {
            number: [match for match in _WORD.finditer(said[number].value) if not match["tag"]] for number in numbers
        }
        names = {number: [_new_word(match[0], next(count)) for match in words[number]] for number in numbers}
        rendered = self._render(
            {number: _replaced(said[number].value, words[number], names[number]) for number in numbers}
        )
        lost: dict[int, str] = {}
        for number in numbers:
            value = said[number].value
            if not words[number] or rendered is None:
                if not any(spelling in self._text for spelling in (value.strip(), *_spellings(value.strip()))):
                    lost[number] = value
                continue
            at = 0
            for match, name in zip(words[number], names[number], strict=True):
                at = rendered.find(name, at)
                if at < 0:
                    if not self._contains_each(value.strip(), said):
                        lost[number] = value[match.start() :]
                    break
        return lost

    def _contains_each(self, text: str, said: list[Said]) -> bool:
        """Return whether the chat's text has a long text as often as the chat says it.

        A template may treat the new words in another way, for example if it cuts texts at a length.
        """
        times = sum(item.is_text and text in item.value for item in said)
        return len(text) >= _LONG and self._text.count(text) >= times

    def changes_text(self, number: int, value: Any) -> bool:
        """Return whether another value in the place of one of an argument changes the text."""
        other: Any = "zyother" if value is None or not isinstance(value, (bool, int, float)) else not value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            other = value + 7919
        return self._render({number: other}) != self._text


def _new_word(word: str, number: int) -> str:
    """Return a word that occurs nowhere else; digits stay digits, so that JSON stays JSON."""
    return f"9{number:07d}9" if word.isdecimal() else f"Zq{number:07d}w"


def _replaced(text: str, words: list[re.Match[str]], names: list[str]) -> str:
    pieces, last = [], 0
    for match, name in zip(words, names, strict=True):
        pieces += [text[last : match.start()], name]
        last = match.end()
    return "".join([*pieces, text[last:]])
