"""Types of what a reader yields, a row of a source and the error for a file that can't be read, and nulls in its rows.

Arrow gives all structs of a column the same keys, and writes null for those that a row does not have. A key whose
values are null in all rows has the type null: somebody wrote it, so it is kept. Where other rows have a value, a null
counts as added. Data whose nulls matter there is given as JSON text, which is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class SourceError(ValueError):
    """A file that cannot be read in the format that its name states."""


class Row(NamedTuple):
    """One row of a file or data set.

    Args:
        id: Place of the row: `file:line` for text files, `file:row` (from 1) for tables.
        columns: Values by column name.
        has_added_nulls: Whether structs may have nulls for keys that only other rows have, see `without_added_nulls`.
        damage: Error of a row that can't be read while the rows after it can; such a row has no columns.
    """

    id: str
    columns: dict[str, Any]
    has_added_nulls: bool = False
    damage: SourceError | None = None


def without_added_nulls(value: Any, feature: Any) -> Any:
    """Return a value without the keys of structs that Arrow added.

    Args:
        value: Value of a column of `datasets`.
        feature: Its feature: a mapping for a struct, a list type with the attribute `feature`, a list with one feature,
            or a type with the attribute `dtype`.
    """
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {
            key: without_added_nulls(item, feature.get(key))
            for key, item in value.items()
            if item is not None or getattr(feature.get(key), "dtype", None) == "null"
        }
    if isinstance(value, (list, tuple)):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return [without_added_nulls(item, inner) for item in value]
    return value


def row_without_added_nulls(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the nulls that Arrow added to its conversations and tools; other columns stay as they are.

    Args:
        row: Values by column.
        features: Features by column.
    """
    return {
        name: without_added_nulls(value, features.get(name))
        if isinstance(value, list) or name in TOOL_COLUMNS
        else value
        for name, value in row.items()
    }


TOOL_COLUMNS = ("tools", "functions")
"""Columns of tool schemas."""
