"""Numbers where text is needed, written as JSON writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sft.data.messages import is_messages
from sft.data.records import Layout

CONTENT_KEYS = ("content", "value")


def numbers_as_text(row: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Write the numbers of a row as text where its layout expects text.

    Args:
        row: Column -> value.
        layout: How the row is read.

    Returns:
        The row, and where it held which number; truth values, NaN and infinity are no numbers here.
    """
    result, found = dict(row), []
    for column in (*layout.content, layout.context, layout.system):
        value = row.get(column) if column else None
        if column and _is_number(value):
            result[column] = json.dumps(value)
            found.append(f"column {column!r} holds the number {value}")
        elif column and is_messages(value):
            result[column] = [_message(message, index, found) for index, message in enumerate(value or ())]
    return result, found


def _message(message: Any, index: int, found: list[str]) -> Any:
    if not isinstance(message, Mapping):
        return message
    numbers = {key: message[key] for key in CONTENT_KEYS if _is_number(message.get(key))}
    found += [f"message {index} has the number {number} as {key}" for key, number in numbers.items()]
    return {**message, **{key: json.dumps(number) for key, number in numbers.items()}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
