"""Everything that a chat says, text by text, and marks that show where a chat template prints each of them.

A chat says its contents, its reasoning, and its tool calls: names, keys and values of their arguments. The rest of a
message (its role, ids, a tool's name, times) is metadata, which a template may print or not.

Marks are private-use characters before and after every text. A template that only prints its messages prints the marks
too, so one rendering with marks shows the place of every text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from sft.chat.template import ChatTemplate, Messages
from sft.chat.template_syntax import only_prints_contents

_SPEECH = re.compile(r"reason|think|thought|rationale|analysis|commentary|chain_of|^cot$|^refusal$")
"""Keys of a message, other than its content and calls, whose values are text of the model."""
_PART_TEXTS = re.compile(r"^(text|content|summary|refusal)$|reason|think|thought")
"""Keys of a part of content, or of an entry of a list of reasoning, whose values are text."""

METADATA = frozenset(
    {"role", "name", "id", "type", "tool_calls", "tool_call_id", "train", "weight", "timestamp", "date", "index"}
)
"""Keys of a message that say nothing by themselves; `tool_calls` is read by its own rules."""

_FIRST_MARK, _MAX_TEXTS = 0xF0000, 0x7FFE
# A template may print a dict as Python does, or JSON in ASCII; both escape private-use characters.
_MARK = re.compile(
    "([\U000f0000-\U000ffffb])|\\\\+U000(f[0-9a-f]{4})|\\\\+u(db[89ab][0-9a-f])\\\\+u(d[c-f][0-9a-f]{2})"
)


_MAX_TAG = 100
TAG = re.compile(rf"<[^<>]{{1,{_MAX_TAG - 2}}}>|\[/?[A-Z_]{{1,{_MAX_TAG - 3}}}\]")
"""Text that a template may look for, such as `<think>` or `[TOOL_CALLS]`."""
_LAST_TAG = re.compile(rf"(?:{TAG.pattern})$")


_PLAIN_MARK = re.compile("([\U000f0000-\U000ffffb])()()()")


def _marks(text: str) -> Iterator[re.Match[str]]:
    return (_MARK if "\\" in text else _PLAIN_MARK).finditer(text)


class Kind(StrEnum):
    """Kind of something that a message says."""

    TEXT = "text"
    NAME = "name of a function"
    KEY = "key of an argument"
    VALUE = "value of an argument"


class Said(NamedTuple):
    """Something that a message says.

    Args:
        message: Index of the message.
        path: Keys and indices that lead to it inside the message.
        value: A text that is not blank; of arguments also a number, a truth value, null, or an empty value.
        kind: What it is.
    """

    message: int
    path: tuple[str | int, ...]
    value: Any
    kind: Kind

    @property
    def is_text(self) -> bool:
        """Whether it is a text that can be marked."""
        return isinstance(self.value, str) and bool(self.value.strip())

    @property
    def place(self) -> str:
        """Describe where it is, for messages."""
        if self.path[0] != "tool_calls":
            return " ".join(map(str, self.path))
        if self.kind is Kind.NAME:
            return f"a call of {self.value!r}"
        return f"argument {'.'.join(map(str, self.path[3:])) or 'text'} of call {self.path[1]}"


Replace = Callable[[Said], Any]


def speech_keys(messages: Messages, source: str) -> frozenset[str]:
    """Return the keys of messages that hold what a message says, besides its tool calls.

    These are `content`, keys of reasoning under their usual names, and any other key that is not metadata and that the
    template mentions.

    Args:
        messages: Messages of one chat.
        source: Jinja source of the template.
    """
    keys = {key for message in messages for key in message} - METADATA
    return frozenset(key for key in keys if key == "content" or _is_speech(key) or _mentions(source, key))


@functools.lru_cache(maxsize=4096)
def _is_speech(key: str) -> bool:
    return _SPEECH.search(key) is not None


@functools.lru_cache(maxsize=4096)
def _mentions(source: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def rewrite(messages: Messages, keys: frozenset[str], replace: Replace) -> list[dict[str, Any]]:
    """Return a chat in which everything that it says is replaced.

    Args:
        messages: Messages as `sft.chat.template.template_messages` returns them.
        keys: Result of `speech_keys`.
        replace: Called with everything that the chat says, always in the same order; returns its new value.
    """
    return [_message(message, index, keys, replace) for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], index: int, keys: frozenset[str], replace: Replace) -> dict[str, Any]:
    result = dict(message)
    for key, value in message.items():
        if key in keys:
            result[key] = _speech(value, index, (key,), replace)
        elif key == "tool_calls":
            result[key] = [_call(call, index, (key, number), replace) for number, call in enumerate(value)]
    return result


def _speech(value: Any, index: int, path: tuple[str | int, ...], replace: Replace) -> Any:
    if isinstance(value, str):
        return replace(Said(index, path, value, Kind.TEXT)) if value.strip() else value
    if isinstance(value, Mapping):
        return {
            key: _speech(item, index, (*path, key), replace) if _PART_TEXTS.search(key) else item
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_speech(item, index, (*path, number), replace) for number, item in enumerate(value)]
    return value


def _call(call: Mapping[str, Any], index: int, path: tuple[str | int, ...], replace: Replace) -> dict[str, Any]:
    function = dict(call["function"])
    path = (*path, "function")
    function["name"] = replace(Said(index, path, function["name"], Kind.NAME))
    if "arguments" in function:
        function["arguments"] = _argument(function["arguments"], index, path, replace)
    return {**call, "function": function}


def _argument(value: Any, index: int, path: tuple[str | int, ...], replace: Replace) -> Any:
    if isinstance(value, Mapping) and value:
        result = {}
        for key, item in value.items():
            new = replace(Said(index, (*path, key), key, Kind.KEY))
            result[new] = _argument(item, index, (*path, key), replace)
        return result
    if isinstance(value, (list, tuple)) and value:
        return [_argument(item, index, (*path, number), replace) for number, item in enumerate(value)]
    return replace(Said(index, path, value, Kind.VALUE))


class Event(NamedTuple):
    """A mark in a rendered chat: its place in the text without marks, and what it opens or closes."""

    at: int
    number: int
    is_end: bool


@dataclass(frozen=True)
class MarkedText:
    """A rendered chat with the places of everything that it says.

    Args:
        text: The text, without marks.
        said: Everything that the chat says.
        inner: For each of `said`, the part of it that was put between marks; None if it was not marked.
        events: Marks in the order of the text.
    """

    text: str
    said: list[Said]
    inner: list[str | None]
    events: list[Event]

    @cached_property
    def runs(self) -> dict[int, list[tuple[int, int]]]:
        """Index of a message -> for each part of the text with only its events, the indices of the first and last."""
        runs: dict[int, list[tuple[int, int]]] = {}
        for index, event in enumerate(self.events):
            of_message = runs.setdefault(self.said[event.number].message, [])
            if of_message and of_message[-1][1] == index - 1:
                of_message[-1] = (of_message[-1][0], index)
            else:
                of_message.append((index, index))
        return runs

    @property
    def num_shown(self) -> int:
        """Number of texts that were printed from the first to the last mark."""
        return len(self.shown)

    @cached_property
    def shown(self) -> dict[int, list[str]]:
        """Number of something said -> what the template printed between its marks, once per time it was printed."""
        opened: dict[int, int] = {}
        shown: dict[int, list[str]] = {}
        for at, number, is_end in self.events:
            if not is_end:
                opened[number] = at
            elif number in opened:
                shown.setdefault(number, []).append(self.text[opened.pop(number) : at])
        return shown

    @cached_property
    def _closed(self) -> dict[int, list[int]]:
        closed: dict[int, list[int]] = {}
        for index, event in enumerate(self.events):
            if event.is_end:
                closed.setdefault(event.number, []).append(index)
        return closed

    def after(self, number: int) -> Iterator[str]:
        """Yield what follows a text each time that it is printed, up to the next that is not a value of an argument."""
        for index in self._closed.get(number, ()):
            later = (
                event.at
                for event in itertools.islice(self.events, index + 1, None)
                if self.said[event.number].kind is not Kind.VALUE
            )
            yield self.text[self.events[index].at : next(later, len(self.text))]


class MarkedChat(NamedTuple):
    """A chat with marks around all of its texts; the template only prints them, so that no other rendering is needed.

    Args:
        chat: Its messages.
        said: Everything that the chat says.
        inner: See `MarkedText`.
    """

    chat: list[dict[str, Any]]
    said: list[Said]
    inner: list[str | None]


def mark_chat(template: ChatTemplate, messages: Messages) -> MarkedChat | None:
    """Put marks into a chat; None if it has to be rendered in other ways, too."""
    keys = speech_keys(messages, template.source)
    if not _prints_as_it_is(template, messages, keys):
        return None
    marked = MarkedChat(*_marked(messages, keys, inside=False))
    return marked if marked.chat else None


def render_with_marks(
    template: ChatTemplate,
    messages: Messages,
    tools: list[Any] | None,
    *,
    add_generation_prompt: bool = False,
    ahead: tuple[MarkedChat, str] | None = None,
) -> tuple[str, MarkedText | None]:
    """Render a chat plainly and with marks.

    Args:
        template: The template.
        messages: Messages as `sft.chat.template.template_messages` returns them.
        tools: Tool schemas.
        add_generation_prompt: Whether to print the generation prompt.
        ahead: The chat as `mark_chat` returns it, and as the template has rendered it already.

    Returns:
        The text, and the same with the places of everything that the chat says. The latter is None if the template
        refuses marked texts or prints other things for them, since it looks at the texts.

    Raises:
        ValueError: The template refuses the chat.
    """
    keys = speech_keys(messages, template.source)
    options = {"add_generation_prompt": add_generation_prompt}
    chat, said, inner = _marked(messages, keys, inside=False) if ahead is None else ahead[0]
    if chat and (ahead is not None or _prints_as_it_is(template, messages, keys)):
        found = _find(template.render([chat], tools, **options)[0] if ahead is None else ahead[1], said, inner)
        num_marked = sum(text is not None for text in inner)
        if num_marked == len(found.shown) == len(found.events) / 2:
            return found.text, found
    try:
        text, *others = template.render([messages, chat] if chat else [messages], tools, **options)
    except ValueError:  # the template may refuse marked texts, and still accept the chat itself
        text, others = template.render([messages], tools, **options)[0], []
    if next(_marks(text), None) is not None:
        return text, None
    best = next((found for other in others if (found := _find(other, said, inner)).text == text), None)
    if best is not None and best.num_shown == sum(part is not None for part in inner):
        return text, best
    chat, said, inner = _marked(messages, keys, inside=True)
    try:
        found = _find(template.render([chat], tools, **options)[0], said, inner)
    except ValueError:
        return text, best
    is_better = found.text == text and found.num_shown > (0 if best is None else best.num_shown)
    return text, found if is_better else best


def _prints_as_it_is(template: ChatTemplate, messages: Messages, keys: frozenset[str]) -> bool:
    """Return whether rendering with marks is enough: only contents are marked, and the template only prints them."""
    return (
        keys == {"content"}
        and template.takes_text
        and only_prints_contents(template.source)
        and all(isinstance(message.get("content"), str) and not message.get("tool_calls") for message in messages)
    )


def _marked(
    messages: Messages, keys: frozenset[str], *, inside: bool
) -> tuple[list[dict[str, Any]], list[Said], list[str | None]]:
    """Return a chat with marks around all of its texts, everything that it says, and what is between the marks.

    Args:
        messages: Messages of one chat.
        keys: Result of `speech_keys`.
        inside: Put marks after a leading and before a trailing tag of a text, and none around names of functions: for
            templates that look at the beginning or end of a text, or compare a name.

    Returns:
        No messages if the chat has more texts than there are marks.
    """
    said: list[Said] = []
    inner: list[str | None] = []

    def mark(item: Said) -> Any:
        number = len(said)
        said.append(item)
        inner.append(None)
        if not item.is_text or number >= _MAX_TEXTS or (inside and item.kind is Kind.NAME):
            return item.value
        text = item.value
        start, end = _inside_tags(text) if inside else _outer(text)
        if start >= end:
            return text
        inner[number] = text[start:end]
        opening, closing = chr(_FIRST_MARK + 2 * number), chr(_FIRST_MARK + 2 * number + 1)
        return f"{text[:start]}{opening}{text[start:end]}{closing}{text[end:]}"

    chat = rewrite(messages, keys, mark)
    return (chat if len(said) <= _MAX_TEXTS else []), said, inner


def _outer(text: str) -> tuple[int, int]:
    """Return the range of a text without outer whitespace, so that a template trims the same whitespace."""
    return len(text) - len(text.lstrip()), len(text.rstrip())


def _inside_tags(text: str) -> tuple[int, int]:
    """Return the range of a text without tags and whitespace at its beginning and end."""
    start, end = _outer(text)
    while match := TAG.match(text, start, end):
        start = match.end()
        start += len(text[start:end]) - len(text[start:end].lstrip())
    while match := _LAST_TAG.search(text, max(start, end - _MAX_TAG), end):
        end = start + len(text[start : match.start()].rstrip())
    return start, end


def _find(text: str, said: list[Said], inner: list[str | None]) -> MarkedText:
    """Remove the marks of a text, and note their places.

    Templates repeat the name of a called function before its result; only its first place counts.
    """
    pieces: list[str] = []
    events: list[Event] = []
    named: set[tuple[int, bool]] = set()
    last = length = 0
    for match in _marks(text):
        number, is_end = divmod(_code(match) - _FIRST_MARK, 2)
        if number < len(said):
            pieces.append(text[last : match.start()])
            length += match.start() - last
            last = match.end()
            event = Event(length, number, bool(is_end))
            if said[number].kind is not Kind.NAME or event[1:] not in named:
                events.append(event)
                named.add(event[1:])
    pieces.append(text[last:])
    return MarkedText("".join(pieces), said, inner, events)


def _code(match: re.Match[str]) -> int:
    if match[1]:
        return ord(match[1])
    if match[2]:
        return int(match[2], 16)
    return 0x10000 + ((int(match[3], 16) & 0x3FF) << 10) + (int(match[4], 16) & 0x3FF)
