"""Texts of a record, each with its place and role, for checks to read or replace."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Path = tuple[str | int, ...]


class Content(NamedTuple):
    """One text of a record.

    Args:
        path: Keys and indices that lead to the text inside the record.
        role: Role of the message, or the column of a plain text (`text`, `prompt`, `completion`, `tools`).
        text: The text itself.
    """

    path: Path
    role: str
    text: str

    @property
    def place(self) -> str:
        """Describe where the text is, for messages."""
        if len(self.path) == 1:
            return str(self.path[0])
        column = "" if self.path[0] == "messages" else f"{self.path[0]} "
        part = "" if self.path[2] == "content" else f", {self.path[2]}"
        return f"{column}message {self.path[1]} ({self.role}{part})"

    @property
    def is_answer(self) -> bool:
        """Whether the text is part of an answer of the model; tool calls and other keys of a message are not."""
        if self.path == ("completion",):
            return True
        return self.role == "assistant" and len(self.path) > 2 and self.path[2] == "content"


def contents(record: Mapping[str, Any]) -> Iterator[Content]:
    """Yield all texts of a record in order, the tools last.

    Of a message these are its content, its other keys that contain text, and the arguments of its tool calls.
    """
    for column in ("messages", "prompt", "completion", "text", "tools"):
        value = record.get(column)
        if isinstance(value, str):
            yield Content((column,), column, value)
            continue
        for index, message in enumerate(value or ()):
            yield from _of_message(message, (column, index))


def _of_message(message: Mapping[str, Any], path: Path) -> Iterator[Content]:
    role = message["role"]
    for key, value in message.items():
        if key == "role":
            continue
        if isinstance(value, str):
            yield Content((*path, key), role, value)
        elif key == "content":
            for index, part in enumerate(value):
                if isinstance(part.get("text"), str):
                    yield Content((*path, key, index, "text"), role, part["text"])
        elif key == "tool_calls":
            for index, call in enumerate(value):
                yield Content((*path, key, index, "function", "arguments"), role, call["function"]["arguments"])


def with_texts(record: Mapping[str, Any], texts: Mapping[Path, str]) -> dict[str, Any]:
    """Return a copy of a record with some of its texts replaced.

    Args:
        record: The record that `contents` was called with.
        texts: New text by the path of a `Content`.
    """
    result = copy.deepcopy(dict(record))
    for path, text in texts.items():
        node: Any = result
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = text
    return result
