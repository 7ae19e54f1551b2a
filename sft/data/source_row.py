"""Types of what a reader yields: a row of a source, and the error for a file that can't be read."""

from __future__ import annotations

from typing import Any, NamedTuple


class SourceError(ValueError):
    """A file that cannot be read in the format that its name states."""


class Row(NamedTuple):
    """One row of a file or data set.

    Args:
        id: Place of the row: `file:line` for text files, `file:row` (from 1) for tables.
        columns: Values by column name.
        has_added_nulls: Whether structs may have nulls for keys that only other rows have, see `sft.data.nulls`.
        damage: Error of a row that can't be read while the rows after it can; such a row has no columns.
    """

    id: str
    columns: dict[str, Any]
    has_added_nulls: bool = False
    damage: SourceError | None = None
