"""Lines of params.yaml on which keys stand, for messages."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode


def find_lines(text: str) -> dict[str, int]:
    """Return the line of each key and list entry, such as `load.sources[0].path`, counted from 1.

    Args:
        text: Content of params.yaml. A text that is not YAML has no keys.
    """
    return {name: mark.line + 1 for name, (mark, *_) in find_nodes(text).items()}


def find_value(text: str, key: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return where the value of a key begins and ends, each as line and column from 0; None if there is no such key."""
    found = find_nodes(text).get(key)
    if found is None:
        return None
    key_end, start, end = found[1], found[2].start_mark, found[2].end_mark
    if start.index == end.index and key_end is not None:  # an empty value, which is null, follows the colon
        return (key_end.line, key_end.column + 1), (key_end.line, key_end.column + 1)
    return (start.line, start.column), (end.line, end.column)


def find_nodes(text: str) -> dict[str, tuple[Any, Any, Any]]:
    """Return where each key or list entry begins, where the key ends, and its value, by name."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, ValueError, RecursionError):
        return {}
    found: dict[str, tuple[Any, Any, Any]] = {}
    waiting: list[tuple[Any, str]] = [(root, "")]
    while waiting:
        node, place = waiting.pop()
        if isinstance(node, MappingNode):
            entries = [
                (f"{place}.{key.value}".lstrip("."), key.start_mark, key.end_mark, value) for key, value in node.value
            ]
        elif isinstance(node, SequenceNode):
            entries = [(f"{place}[{number}]", value.start_mark, None, value) for number, value in enumerate(node.value)]
        else:
            continue
        for name, mark, key_end, value in entries:
            if name not in found:  # an alias that contains itself ends here
                found[name] = (mark, key_end, value)
                waiting.append((value, name))
    return found


def line_of(key: str, lines: dict[str, int]) -> int | None:
    """Return the line of a key, or that of the nearest section that contains it; None if there is none."""
    while key:
        if key in lines:
            return lines[key]
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return None
