"""One row of a source, and the error of a file that can't be read."""

from __future__ import annotations

from typing import Any, NamedTuple


class SourceError(ValueError):
    """A file that cannot be read as what its name says."""


class Row(NamedTuple):
    """One row of a source.

    Args:
        id: Where it is: `file:line` for text files, `file:row` (from 1) for tables.
        columns: Column -> value.
        from_arrow: Whether it comes out of an Arrow table, whose structs hold nulls that nobody wrote.
        damage: What keeps it from being read, where the rows after it still can be; it has no columns then.
    """

    id: str
    columns: dict[str, Any]
    from_arrow: bool = False
    damage: SourceError | None = None
