"""Reading of JSON lines and JSON files, also compressed; only a piece of the file is in memory at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.source_row import Row, SourceError
from sft.data.text_reader import decoded, pieces, raw_lines

MAX_DIGITS = 4300
"""Longest integer in digits; Python's own limit."""

LONGEST_PATTERN = 1000
"""Characters to have in memory before a pattern is matched."""

# Keys under which a JSON file may have its list of rows.
_WRAPPED = re.compile(r'\{[ \t\r\n]*"(data|rows|examples|instances|train)"[ \t\r\n]*:[ \t\r\n]*(?=\[)')

_WHITESPACE = re.compile(r"[ \t\r\n]*")

MAX_DEPTH = 100
"""Most lists and objects in one another, so that no later step ends in a RecursionError."""

_TOO_DEEP = "lists or objects lie too deep in one another to be read"

_LIST_HINT = "; a list of all rows is a .json file: rename it to .json, or write one object a line"

_JSON_NAMES: dict[type, str] = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}


class RepeatedKeyError(ValueError):
    """A JSON object that has the same key twice, so that its value is ambiguous."""


class LongNumberError(ValueError):
    """A number in a JSON file with more than `MAX_DIGITS` digits."""


def jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of JSON lines: one object per line; blank lines are skipped.

    A line that is not an object is a damaged row.
    """
    is_first = True
    for number, line in raw_lines(path):
        if line.isspace():
            continue
        try:
            columns, damage = _columns(line, path, number, is_first=is_first), None
        except SourceError as error:
            columns, damage = {}, error
        is_first = False
        yield Row(f"{name}:{number}", columns, damage=damage)


def json_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a JSON file: a list of objects, one object with such a list, or consecutive objects."""
    is_wrapped = _is_wrapped(path)
    text = Window(path)
    line = on_line = 0
    try:
        for value in _elements(text, is_wrapped=is_wrapped):
            on_line = on_line + 1 if text.line == line else 1
            line = text.line
            number = f"{line}" if on_line == 1 else f"{line}#{on_line}"
            try:
                columns, damage = _object(value, f"{path}:{number}"), None
            except SourceError as error:
                columns, damage = {}, error
            yield Row(f"{name}:{number}", columns, damage=damage)
    except (RepeatedKeyError, LongNumberError) as error:
        raise SourceError(f"{path}: in or after the row at line {max(line, 1)}: {error}") from error
    except RecursionError as error:
        raise SourceError(f"{path}: in or after the row at line {max(line, 1)}: {_TOO_DEEP}") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{text.place(error)}: not JSON: {error.msg}, in {_excerpt(error)}") from error


def _columns(line: bytes, path: Path, number: int, *, is_first: bool) -> dict[str, Any]:
    """Parse a line as an object; the error for the first line detects a file that is a list of all rows."""
    place, text = f"{path}:{number}", decoded(line, path, number)
    hint = _LIST_HINT if is_first and text.lstrip().startswith("[") else ""
    try:
        return _object(_DECODER.decode(text), place, hint)
    except RecursionError as error:
        raise SourceError(f"{place}: {_TOO_DEEP}") from error
    except json.JSONDecodeError as error:
        raise SourceError(f"{place}:{error.colno}: not JSON: {error.msg}, in {_excerpt(error)}{hint}") from error
    except (RepeatedKeyError, LongNumberError) as error:
        raise SourceError(f"{place}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise RepeatedKeyError(f"the key {twice!r:.80} stands twice in one object; remove one of the two")
    return result


def _integer(digits: str) -> int:
    """Parse an integer; Python refuses very long ones too, with an error that does not name the file."""
    if len(digits) > MAX_DIGITS:
        raise LongNumberError(f"a number of {len(digits)} digits, more than {MAX_DIGITS}; write it as text")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _shown(value: Any) -> str:
    """Describe a JSON value by its type and beginning, for error messages."""
    if value is None:
        return "null"
    try:
        shown = f"{value!r:.60}"
    except (RecursionError, ValueError):  # too deep, or a number that Python does not print
        shown = "..."
    return f"{_JSON_NAMES.get(type(value), type(value).__name__)} {shown}"


def _excerpt(error: json.JSONDecodeError) -> str:
    return repr(error.doc[max(0, error.pos - 30) : error.pos + 30].strip("\r\n"))


def _object(value: Any, place: str, hint: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{place}: a row must be a JSON object, not {_shown(value)}{hint}")
    if _is_deep(value):
        raise SourceError(f"{place}: {_TOO_DEEP}")
    return value


def _is_deep(value: Any) -> bool:
    """Return whether more than `MAX_DEPTH` lists and objects lie in one another."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


class Window:
    """The part of a JSON file that is being read; earlier parts are dropped, later ones are not read yet.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._pieces = pieces(path)
        self._text = ""
        self._at = 0
        self._first_line, self._first_column = 1, 1
        self._counted = 0
        self.line = 1
        """Line on which the most recently read value begins."""

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """Skip whitespace and a match of `pattern`; return the match, or None if there is none."""
        self.peek()
        while len(self._text) - self._at < LONGEST_PATTERN and self._read_on():
            pass
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def peek(self) -> str:
        """Skip whitespace; return the next character, or an empty text at the end of the file."""
        while True:
            found = _WHITESPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def skip_character(self) -> None:
        """Skip one character."""
        self._at += 1

    def value(self) -> Any:
        """Read the value that begins at the current position."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._read_on():
                    raise
                continue
            # a number may continue after the part that has been read
            if end == len(self._text) and self._read_on():
                continue
            self.line += self._text.count("\n", self._counted, self._at)
            self._counted, self._at = self._at, end
            return value

    def error(self, message: str) -> json.JSONDecodeError:
        """Return an error at the current position."""
        return json.JSONDecodeError(message, self._text, self._at)

    def place(self, error: json.JSONDecodeError) -> str:
        """Return line and column of an error in the file."""
        column = error.colno if error.lineno > 1 else self._first_column + error.colno - 1
        return f"{self._first_line + error.lineno - 1}:{column}"

    def _read_on(self) -> bool:
        """Read at least as much as is left, so that the part doubles and a long value is parsed again only a few times.

        Returns:
            False at the end of the file.
        """
        before, left = self._text[: self._at], self._text[self._at :]
        ahead: list[str] = []
        num_characters = 0
        for piece in self._pieces:
            ahead.append(piece)
            num_characters += len(piece)
            if num_characters and num_characters >= len(left):
                break
        if num_characters == 0:
            return False
        num_ends = before.count("\n")
        self._first_line += num_ends
        self._first_column = self._at - before.rfind("\n") if num_ends else self._first_column + self._at
        self.line += before.count("\n", self._counted)
        self._text, self._at, self._counted = left + "".join(ahead), 0, 0
        return True


def _is_wrapped(path: Path) -> bool:
    """Return whether the file is one object whose only key is a list of rows; reads the file to its end."""
    text = Window(path)
    if text.take(_WRAPPED) is None:
        return False
    try:
        for _ in _list_elements(text):
            pass
    except (ValueError, RecursionError):
        return True  # the reader finds the same damage and reports it
    if text.peek() != "}":
        return False
    text.skip_character()
    return text.peek() == ""


def _elements(text: Window, *, is_wrapped: bool) -> Iterator[Any]:
    """Yield the rows of a JSON text."""
    if is_wrapped:
        text.take(_WRAPPED)
        yield from _list_elements(text)
    elif text.peek() == "[":
        yield from _list_elements(text)
        if text.peek():
            raise text.error("unexpected text after the list of rows")
    else:
        while text.peek():
            yield text.value()


def _list_elements(text: Window) -> Iterator[Any]:
    """Yield the elements of the list that begins at the current position."""
    text.skip_character()
    if text.peek() == "]":
        text.skip_character()
        return
    while True:
        text.peek()
        yield text.value()
        character = text.peek()
        if character not in (",", "]"):
            raise text.error("expected , or ] after a row")
        text.skip_character()
        if character == "]":
            return
