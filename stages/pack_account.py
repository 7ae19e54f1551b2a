"""What became of every token: the ledger's entries of `pack`, and the way back from a packed token to its record."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sft.tokens.columns import Pieces, RowPlan
from sft.tokens.overflow import OverflowReport

DONE = {"truncated": "cut", "split": "split", "divided": "split", "dropped": "drop", "masked": "drop"}
"""Reason of an entry -> what was done to the document."""


class Lost(NamedTuple):
    """One document that was cut, divided or left out.

    Args:
        id: Its record.
        reason: `truncated`, `split` (at the limit), `dropped` (too long), `masked` (nothing in it is trained) or
            `divided` (where a row was full; no token is lost).
        tokens_lost: Tokens of it that are in no row.
        trained_tokens_lost: How many of them are trained.
    """

    id: str
    reason: str
    tokens_lost: int
    trained_tokens_lost: int

    def to_row(self) -> dict[str, Any]:
        """The entry as the ledger has it."""
        return {
            "id": self.id,
            "stage": "pack",
            "reason": self.reason,
            "action": DONE[self.reason],
            "tokens_lost": self.tokens_lost,
            "trained_tokens_lost": self.trained_tokens_lost,
        }


def crossed(row_id: str, detail: str) -> dict[str, Any]:
    """The ledger's entry of a document in which a token lies across the border of what is trained."""
    nothing = {"tokens_lost": 0, "trained_tokens_lost": 0}
    return {"id": row_id, "stage": "pack", "reason": "border_in_token", "action": "warn", "detail": detail, **nothing}


def losses(ids: pa.ChunkedArray, report: OverflowReport, pieces: Pieces, plan: RowPlan) -> Iterator[Lost]:
    """One entry for every document that the limit touched or a row's end divided.

    Args:
        ids: `(num_documents,)` their ids.
        report: What the limit did.
        pieces: What the limit left.
        plan: The rows made of it.
    """
    for reason, rows in report.row_indices.items():
        for row in rows:
            yield Lost(ids[row].as_py(), reason, report.tokens_lost[row], report.trained_tokens_lost[row])
    size = report.num_rows
    divided = np.bincount(plan.pieces.document, minlength=size) > np.bincount(pieces.document, minlength=size)
    for row in np.flatnonzero(divided).tolist():
        yield Lost(ids[row].as_py(), "divided", 0, 0)


def index_entries(ids: pa.ChunkedArray, plan: RowPlan) -> Iterator[dict[str, Any]]:
    """For every packed row the documents in it, in order.

    Returns:
        Objects with `row`, `ids`, `ends` (the token behind each document's last one) and `starts` (the token of its
        record with which each document begins: not 0 for the later parts of one that was divided).
    """
    first = 0
    names = ids.take(pa.array(plan.pieces.document)) if len(plan.pieces) else ids
    for row, last in enumerate(plan.ends.tolist()):
        yield {
            "row": row,
            "ids": names[first:last].to_pylist(),
            "ends": np.cumsum(plan.pieces.length[first:last]).tolist(),
            "starts": plan.pieces.start[first:last].tolist(),
        }
        first = last


class Origin(NamedTuple):
    """Where a packed token comes from: its record, and which of the record's tokens it is."""

    id: str
    token: int


def origin_of(entry: Mapping[str, Sequence[Any]], position: int) -> Origin:
    """The way back from a token to its record.

    Args:
        entry: The packed row's entry in the index.
        position: Number of the token in the row.

    Raises:
        ValueError: The row is shorter.
    """
    ends = entry["ends"]
    if not 0 <= position < ends[-1]:
        raise ValueError(f"packed row {entry['row']} has {ends[-1]} tokens; there is no token {position}")
    place = bisect_right(ends, position)
    begin = ends[place - 1] if place else 0
    return Origin(entry["ids"][place], entry["starts"][place] + position - begin)
