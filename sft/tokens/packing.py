"""Pack tokenized documents into rows of at most `seq_length` tokens.

A packed row keeps its documents apart: `seq_lengths` lists their lengths, and a document that is divided goes on as
another document. Best-fit decreasing is described in D. S. Johnson et al., "Worst-case performance bounds for simple
one-dimensional packing algorithms" (1974); its use for training in arXiv:2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from sft.tokens.columns import TOKEN_COLUMNS, Integers, Pieces, RowPlan, materialize, token_columns, whole
from sft.tokens.overflow import Overflow, OverflowReport, apply_overflow, cut_pieces, plan_overflow, truncate_dataset

__all__ = [
    "Overflow",
    "OverflowReport",
    "PackingStrategy",
    "apply_overflow",
    "limit_and_pack",
    "pack_dataset",
    "pack_with_plan",
    "plan_bfd",
    "plan_rows",
    "truncate_dataset",
]


class PackingStrategy(StrEnum):
    """Ways to fill rows."""

    BFD = "bfd"
    BFD_SPLIT = "bfd_split"
    WRAPPED = "wrapped"


def plan_bfd(lengths: Sequence[int] | Integers, seq_length: int) -> list[list[int]]:
    """Assign documents to rows by best fit, longest first: each goes where it leaves the least room.

    Deterministic: equal lengths go by their number, equal rooms to the row opened last. O(n log n) apart from moves
    within a list of at most `seq_length` numbers; 100,000 documents take a fraction of a second.

    Args:
        lengths: `(num_documents,)` tokens of each, 1 to `seq_length`.
        seq_length: tokens that a row holds.

    Returns:
        Rows of document numbers, in the order in which rows were opened; within a row, longest document first.

    Raises:
        ValueError: a document is empty or longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    unfit = np.flatnonzero((sizes < 1) | (sizes > seq_length))
    if len(unfit):
        first = int(unfit[0])
        raise ValueError(
            f"{len(unfit)} documents do not fit rows of {seq_length} tokens; the first is number {first} "
            f"with {sizes[first]}"
        )
    order = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room left, sorted
    rows_with: dict[int, list[int]] = {}
    for document, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, row = seq_length, len(rows)
            rows.append([document])
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            rows[row].append(document)
            if not rows_with[room]:
                del rooms[place]
        _offer(rooms, rows_with, room - size, row)
    return rows


def _offer(rooms: list[int], rows_with: dict[int, list[int]], room: int, row: int) -> None:
    """Note that a row has this much room left; full rows are done with."""
    if room == 0:
        return
    waiting = rows_with.setdefault(room, [])
    if not waiting:
        insort(rooms, room)
    waiting.append(row)


def pack_dataset(
    dataset: Dataset | IterableDataset, seq_length: int, strategy: str = "bfd", buffer_size: int = 1000
) -> Dataset | IterableDataset:
    """Pack tokenized documents into rows of at most `seq_length` tokens.

    Args:
        dataset: rows with `input_ids` and perhaps `labels`, `loss_weights`, masks; other columns are left behind.
            A streamed data set is packed `buffer_size` documents at a time.
        seq_length: tokens that a row holds.
        strategy: `bfd` (best-fit decreasing; longer documents are cut off at `seq_length`), `bfd_split` (longer ones
            are divided, and nothing is lost), `wrapped` (in the given order, divided wherever a row is full).
        buffer_size: documents that a streamed data set is packed from at a time.

    Returns:
        Rows with `input_ids`, `labels`, `seq_lengths` and the other token columns of the source.

    Raises:
        ValueError: unknown strategy, `seq_length` below 1, or no `input_ids`.
    """
    if isinstance(dataset, IterableDataset):
        _checked(seq_length, strategy)
        pack = partial(_pack_batch, seq_length=seq_length, strategy=strategy)
        names = dataset.column_names or list(next(iter(dataset)))
        return dataset.map(pack, batched=True, batch_size=buffer_size, remove_columns=names)
    return pack_with_plan(dataset, seq_length, strategy)[0]


def pack_with_plan(dataset: Dataset, seq_length: int, strategy: str = "bfd") -> tuple[Dataset, list[list[int]]]:
    """Pack as `pack_dataset` does and tell which documents each row holds.

    Returns:
        The packed data set, and for every row the source rows of its documents, one a document in row order (a source
        row that was divided appears once for each of its pieces).
    """
    plan = plan_rows(whole(token_columns(dataset)["input_ids"].lengths()), seq_length, strategy)
    members = [part.tolist() for part in np.split(plan.pieces.document, plan.ends[:-1])] if len(plan.ends) else []
    return materialize(dataset, plan), members


def limit_and_pack(dataset: Dataset, max_length: int, strategy: str = "bfd") -> tuple[Dataset, OverflowReport]:
    """Apply the length limit, leave out documents in which nothing is trained, and pack; every token is moved once.

    Args:
        dataset: tokenized rows.
        max_length: tokens that a row holds. `bfd` cuts longer documents, `bfd_split` and `wrapped` divide them.
        strategy: as in `pack_dataset`.

    Returns:
        The packed data set, and what the limit did to the documents.
    """
    chosen = _checked(max_length, strategy)
    columns = token_columns(dataset)
    # wrapping divides documents wherever a row is full, so the limit itself leaves them whole
    longest = int(columns["input_ids"].lengths().max(initial=1))
    limit = max(longest, max_length) if chosen is PackingStrategy.WRAPPED else max_length
    policy = Overflow.SPLIT if chosen is PackingStrategy.BFD_SPLIT else Overflow.TRUNCATE
    pieces, report = plan_overflow(columns, limit, policy)
    return materialize(dataset, plan_rows(pieces, max_length, chosen)), report


def plan_rows(pieces: Pieces, seq_length: int, strategy: str = "bfd") -> RowPlan:
    """Decide which pieces of documents share a row, without moving a token.

    Args:
        pieces: stretches of documents, each to be packed as a document of its own.
        seq_length: tokens that a row holds.
        strategy: as in `pack_dataset`.

    Raises:
        ValueError: unknown strategy, or `seq_length` below 1.
    """
    chosen = _checked(seq_length, strategy)
    if chosen is PackingStrategy.WRAPPED:
        plan = _plan_wrapped(pieces.length, seq_length)
    else:
        plan = _plan_best_fit(pieces.length, seq_length, chosen)
    return RowPlan(plan.pieces.within(pieces), plan.ends)


def _checked(seq_length: int, strategy: str) -> PackingStrategy:
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, found {seq_length}")
    if strategy not in list(PackingStrategy):
        raise ValueError(f"packing strategy {strategy!r} is unknown; use one of {', '.join(PackingStrategy)}")
    return PackingStrategy(strategy)


def _plan_best_fit(lengths: Integers, seq_length: int, strategy: PackingStrategy) -> RowPlan:
    policy = Overflow.SPLIT if strategy is PackingStrategy.BFD_SPLIT else Overflow.TRUNCATE
    pieces = cut_pieces(lengths, seq_length, policy)
    pieces = pieces[pieces.length > 0]
    bins = plan_bfd(pieces.length, seq_length)
    order = np.array([piece for row in bins for piece in row], dtype=np.int64)
    return RowPlan(pieces[order], np.cumsum([len(row) for row in bins], dtype=np.int64))


def _plan_wrapped(lengths: Integers, seq_length: int) -> RowPlan:
    """Cut the concatenation of all documents at document ends and at multiples of `seq_length`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(seq_length, total, seq_length))
    cuts = cuts[cuts > 0]
    starts = np.concatenate([[0], cuts[:-1]]).astype(np.int64)[: len(cuts)]
    document = np.searchsorted(ends, starts, side="right")
    pieces = Pieces(document, starts - (ends - lengths)[document], cuts - starts)
    row_ends = np.searchsorted(cuts, np.arange(seq_length, total + seq_length, seq_length), side="right")
    return RowPlan(pieces, row_ends)


def _pack_batch(batch: dict[str, list[Any]], seq_length: int, strategy: str) -> dict[str, list[Any]]:
    buffer = Dataset(pa.table({name: batch[name] for name in TOKEN_COLUMNS if name in batch}))
    return pack_with_plan(buffer, seq_length, strategy)[0].to_dict()
