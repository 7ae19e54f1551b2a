"""Keys that a params.yaml of an earlier version lacks: which ones, and where they are written."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from stages.params.assignments import means, round_trip
from stages.params.places import find_nodes
from stages.params.schema import Params, model_at
from stages.params.text import entry_lines, neutral_values

INDENT = 2
"""Spaces per level of a params.yaml."""


@dataclass(frozen=True)
class Additions:
    """A completed params.yaml.

    Args:
        text: Its content.
        values: Dotted name of each added key -> its value.
    """

    text: str
    values: dict[str, Any]


def add_missing(text: str) -> Additions:
    """Add the keys that a params.yaml lacks: those with a default with it, the others with that of `neutral_values`.

    Each is written with its comment after the key that precedes it in the schema; all other lines stay unchanged.

    Args:
        text: Content of a params.yaml; valid YAML.
    """
    values = YAML(typ="safe", pure=True).load(text)
    if not isinstance(values, Mapping):
        return Additions(text, {})
    added: dict[str, Any] = {}
    result = _completed(values, neutral_values(), (), added)
    edited = text
    for name, value in added.items():
        edited = _insert(edited, tuple(name.split(".")), value)
        if edited == "":
            break
    if not means(edited, result):
        edited = _rewritten(text, added)
    return Additions(edited, added)


def _completed(
    values: Mapping[str, Any], neutral: Mapping[str, Any], parents: tuple[str, ...], added: dict[str, Any]
) -> dict[str, Any]:
    result = dict(values)
    for key, value in neutral.items():
        name, section = (*parents, key), model_at(Params, (*parents, key))
        if key not in values:
            field = _fields(parents)[key]
            if not field.is_required():
                value = field.get_default(call_default_factory=True)
                value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            added[".".join(name)] = result[key] = value
        elif section is not None and isinstance(value, Mapping) and isinstance(values[key], Mapping):
            result[key] = _completed(values[key], value, name, added)
    return result


def _insert(text: str, name: tuple[str, ...], value: Any) -> str:
    """Write a key after those that precede it in the schema; return "" if its section is in braces."""
    parent, nodes = ".".join(name[:-1]), find_nodes(text)
    fields = _fields(name[:-1])
    siblings = {key: nodes[full] for key in fields if (full := f"{parent}.{key}".lstrip(".")) in nodes}
    if not siblings or (parent and nodes[parent][2].flow_style):
        return ""
    before = [key for key in list(fields)[: list(fields).index(name[-1])] if key in siblings]
    first = min((mark for mark, *_ in siblings.values()), key=lambda mark: mark.index)
    lines = text.split("\n")
    place, column = _last_line(siblings[before[-1]][2]) + 1 if before else first.line, first.column
    # the comment of the key before may go on below it, in the column of comments
    while before and place < len(lines) and _is_comment_right_of(lines[place], column):
        place += 1
    new = [*([""] if len(name) == 1 else []), *entry_lines(name[-1], value, len(name) - 1, fields[name[-1]])]
    shift = " " * (column - INDENT * (len(name) - 1)) if column > INDENT * (len(name) - 1) else ""
    return "\n".join([*lines[:place], *(f"{shift}{line}" if line else "" for line in new), *lines[place:]])


def _fields(section: tuple[str, ...]) -> dict[str, FieldInfo]:
    model = model_at(Params, section)
    assert model is not None
    return model.model_fields


def _last_line(node: Node) -> int:
    """Return the line on which a value ends; the end of a block is the next token, which may be far below."""
    if isinstance(node, (MappingNode, SequenceNode)) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last)
    end = node.end_mark
    return int(end.line - 1 if end.column == 0 and end.line > node.start_mark.line else end.line)


def _is_comment_right_of(line: str, column: int) -> bool:
    stripped = line.lstrip(" ")
    return stripped.startswith("#") and len(line) - len(stripped) > column


def _rewritten(text: str, added: Mapping[str, Any]) -> str:
    """Add keys by writing the whole file anew, with its comments but perhaps with other line breaks."""
    yaml = round_trip()
    document = yaml.load(text)
    for name, value in added.items():
        *parents, last = name.split(".")
        target = document
        for parent in parents:
            target = target[parent]
        target[last] = value
    written = io.StringIO()
    yaml.dump(document, written)
    return written.getvalue()
