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
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, ValueError, RecursionError):
        return {}
    lines: dict[str, int] = {}
    waiting: list[tuple[Any, str]] = [(root, "")]
    while waiting:
        node, place = waiting.pop()
        if isinstance(node, MappingNode):
            entries = [(f"{place}.{key.value}".lstrip("."), key, value) for key, value in node.value]
        elif isinstance(node, SequenceNode):
            entries = [(f"{place}[{number}]", value, value) for number, value in enumerate(node.value)]
        else:
            continue
        for name, mark, value in entries:
            if name not in lines:  # an alias that contains itself ends here
                lines[name] = mark.start_mark.line + 1
                waiting.append((value, name))
    return lines


def line_of(key: str, lines: dict[str, int]) -> int | None:
    """Return the line of a key, or that of the nearest section that contains it; None if there is none."""
    while key:
        if key in lines:
            return lines[key]
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return None
