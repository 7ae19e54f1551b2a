"""Length limit and packing of tokenized documents.

The length limit truncates, splits, drops or refuses documents that are too long, and counts what it did.

Packing puts documents into rows of at most `seq_length` tokens. `seq_lengths` lists the lengths of a row's documents,
so that attention can keep them separate; the parts of a document that is split count as documents. Best-fit decreasing
is described in D. S. Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms"
(1974), and its use for training in arXiv:2404.10830.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from sft.options import OVERFLOW_POLICIES, PACKING_STRATEGIES
from sft.tokens.columns import (
    TOKEN_COLUMNS,
    Columns,
    Integers,
    Pieces,
    RowPlan,
    count_trained,
    materialize,
    token_columns,
    whole,
)
from sft.tokens.prompts import cut_from_prompts, divide_with_prompts


@dataclass(frozen=True)
class OverflowReport:
    """Effect of a length limit on a data set; row numbers are those of the input.

    Attributes:
        policy: The overflow policy.
        max_length: The limit in tokens.
        num_rows: Number of input rows.
        truncated: Rows that were truncated at the limit.
        split: Rows that were split into several.
        dropped: Rows that were dropped for their length.
        masked: Rows that were dropped because nothing in them is trained, possibly only after truncation; empty rows
            are among them.
        tokens_lost: Number of tokens that are in no output row, for every row with an effect.
        trained_tokens_lost: Number of trained tokens among those, for every row with an effect.
        source_rows: `(num_output_rows,)` input row of each output row.
        num_untrained_pieces: Parts of split rows that were dropped because nothing in them is trained.
        num_answers_cut: Answers, or parts of answers, that are trained without their whole prompt.
        num_trained_cut: Trained tokens in them.
        num_repeated: Tokens of prompts that are in several output rows, without the first time.
    """

    policy: str
    max_length: int
    num_rows: int
    truncated: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    tokens_lost: dict[int, int] = field(default_factory=dict)
    trained_tokens_lost: dict[int, int] = field(default_factory=dict)
    source_rows: list[int] = field(default_factory=list)
    num_untrained_pieces: int = 0
    num_answers_cut: int = 0
    num_trained_cut: int = 0
    num_repeated: int = 0

    @property
    def num_tokens_lost(self) -> int:
        """Number of tokens that are in no output row."""
        return sum(self.tokens_lost.values())

    @property
    def num_truncated(self) -> int:
        """Number of rows that were truncated."""
        return len(self.truncated)

    @property
    def num_split(self) -> int:
        """Number of rows that were split."""
        return len(self.split)

    @property
    def num_dropped(self) -> int:
        """Number of rows that were dropped, for their length or because nothing in them is trained."""
        return len(self.dropped) + len(self.masked)

    @property
    def row_indices(self) -> dict[str, list[int]]:
        """Rows with an effect, by the kind of effect."""
        return {
            "truncated": self.truncated,
            "split": self.split,
            "dropped": self.dropped,
            "masked": self.masked,
        }

    @property
    def touched(self) -> list[int]:
        """All rows with an effect, in order."""
        return sorted(itertools.chain.from_iterable(self.row_indices.values()))

    def summary(self) -> str:
        """Return one line for the log; empty if no row was affected."""
        parts = [f"{len(rows)} {name} (first: row {rows[0]})" for name, rows in self.row_indices.items() if rows]
        if not parts:
            return ""
        cut = f"; {self.num_answers_cut} answers without their whole prompt" if self.num_answers_cut else ""
        return f"limit of {self.max_length} tokens: {', '.join(parts)}; {self.num_tokens_lost} tokens lost{cut}"


class Limited(NamedTuple):
    """Documents within a length limit.

    Attributes:
        columns: Token columns of the documents that `pieces` are parts of: those given, or parts with their prompts.
        pieces: The parts of them to keep.
        source: `(num_documents,)` the given document of each document in `columns`.
        report: What the limit did.
    """

    columns: Columns
    pieces: Pieces
    source: Integers
    report: OverflowReport


def cut_pieces(lengths: Integers, max_length: int, policy: str, *, keep_end: bool = False) -> Pieces:
    """Return the parts of documents to keep, each of at most `max_length` tokens.

    Args:
        lengths: `(num_documents,)` number of tokens in each document.
        max_length: Limit in tokens.
        policy: `truncate`, `split` or `drop`.
        keep_end: Whether `truncate` keeps the end of a document instead of its beginning.
    """
    documents: Integers = np.arange(len(lengths))
    if policy == "drop":
        documents = documents[lengths <= max_length]
    kept = lengths[documents]
    if policy == "truncate":
        length = np.minimum(kept, max_length)
        return Pieces(documents, kept - length if keep_end else np.zeros_like(documents), length)
    counts = np.maximum(1, -(-kept // max_length))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    document, start = np.repeat(documents, counts), number * max_length
    return Pieces(document, start, np.minimum(lengths[document] - start, max_length))


def apply_overflow(
    dataset: Dataset, max_length: int, policy: str = "truncate", *, keep_end: bool = False
) -> tuple[Dataset, OverflowReport]:
    """Apply a length limit to every document, and drop those in which nothing is trained.

    Args:
        dataset: Tokenized rows; columns other than the token columns are kept unchanged.
        max_length: Limit in tokens.
        policy: `truncate`, `split` (into several documents), `split_with_prompt` (see `sft.tokens.prompts`), `drop` or
            `error`.
        keep_end: Whether `truncate` keeps the end of a document instead of its beginning.

    Returns:
        The data set (the same object if nothing changed), and a report.

    Raises:
        ValueError: The limit is below 1, or the policy is `error` and a document is too long.
    """
    columns = token_columns(dataset)
    ids = dataset["id"] if "id" in dataset.column_names else None
    limited = plan_overflow(columns, max_length, policy, ids, keep_end=keep_end)
    pieces, report = limited.pieces, limited.report
    if len(pieces) == len(dataset) and not report.touched:
        return dataset, report
    others = dataset.remove_columns(list(columns)).select(report.source_rows)
    plan = RowPlan(pieces, np.arange(1, len(pieces) + 1))
    return materialize(dataset, plan, carry=others, columns=limited.columns), report


def plan_overflow(
    columns: Columns,
    max_length: int,
    policy: str = "truncate",
    ids: Sequence[Any] | None = None,
    *,
    keep_end: bool = False,
) -> Limited:
    """Plan a length limit as in `apply_overflow`, without moving tokens.

    Args:
        columns: `input_ids`, and `labels` unless all tokens are trained.
        max_length: Limit in tokens.
        policy: `truncate`, `split`, `split_with_prompt`, `drop` or `error`.
        ids: `(num_documents,)` names of the documents in messages.
        keep_end: Whether `truncate` keeps the end of a document instead of its beginning.

    Raises:
        ValueError: The limit is too small, or the policy is `error` and a document is too long.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, found {max_length}")
    if policy not in OVERFLOW_POLICIES:
        raise ValueError(f"overflow policy {policy!r} is unknown; use one of {', '.join(OVERFLOW_POLICIES)}")
    lengths = columns["input_ids"].lengths()
    if policy == "error":
        _refuse_long(lengths, max_length, ids)
    if policy == "split_with_prompt":
        return _plan_parts(columns, max_length)
    pieces = cut_pieces(lengths, max_length, policy, keep_end=keep_end)
    trained, is_kept = _count_kept(columns, pieces)
    kept = pieces[is_kept]
    report = _report(policy, max_length, lengths, kept.document)
    _count_losses(report, columns, kept, trained[is_kept])
    is_split = np.isin(pieces.document, report.split)
    report = replace(report, num_untrained_pieces=int((is_split & ~is_kept).sum()))
    if "labels" in columns:
        num_answers, num_tokens = cut_from_prompts(columns["labels"], lengths, kept)
        report = replace(report, num_answers_cut=num_answers, num_trained_cut=num_tokens)
    return Limited(columns, kept, np.arange(len(lengths)), report)


def _plan_parts(columns: Columns, max_length: int) -> Limited:
    """Plan a length limit whose parts keep their prompts."""
    parts = divide_with_prompts(columns, max_length)
    divided = parts.columns(columns)
    pieces = whole(divided["input_ids"].lengths())
    trained, is_kept = _count_kept(divided, pieces)
    kept = parts[is_kept]
    report = _report("split_with_prompt", max_length, columns["input_ids"].lengths(), kept.document)
    _count_losses(report, columns, Pieces(kept.document, kept.start, kept.length), trained[is_kept])
    is_split = np.isin(parts.document, report.split)
    report = replace(
        report,
        num_untrained_pieces=int((is_split & ~is_kept).sum()),
        num_answers_cut=int((kept.num_cut > 0).sum()),
        num_trained_cut=int(kept.num_cut.sum()),
        num_repeated=int(kept.prompt_length.sum()),
    )
    return Limited(divided, pieces[is_kept], parts.document, report)


def _count_kept(columns: Columns, pieces: Pieces) -> tuple[Integers, np.ndarray[Any, Any]]:
    """Return the number of trained tokens in each piece, and whether it has a target."""
    if "labels" in columns:
        trained, targets = count_trained(columns["labels"], pieces)
    else:
        trained = targets = pieces.length
    return trained, targets > 0


def _count_losses(report: OverflowReport, columns: Columns, kept: Pieces, trained: Integers) -> None:
    """Add the number of tokens that each affected row lost to the report.

    Args:
        report: The report.
        columns: Columns of the input.
        kept: What is kept, without prompts that are repeated.
        trained: `(num_pieces,)` trained tokens.
    """
    lengths = columns["input_ids"].lengths()
    rows = np.array(report.touched, dtype=np.int64)
    touched = whole(lengths)[rows]
    before = count_trained(columns["labels"], touched)[0] if "labels" in columns else touched.length
    after = np.bincount(kept.document, kept.length, len(lengths)).astype(np.int64)[rows]
    after_trained = np.bincount(kept.document, trained, len(lengths)).astype(np.int64)[rows]
    report.tokens_lost.update(zip(report.touched, (lengths[rows] - after).tolist(), strict=True))
    report.trained_tokens_lost.update(zip(report.touched, (before - after_trained).tolist(), strict=True))


def _report(policy: str, max_length: int, lengths: Integers, kept: Integers) -> OverflowReport:
    """Return the report of a limit; `kept` are the documents of the pieces that are kept."""
    too_long = np.flatnonzero(lengths > max_length)
    gone = np.setdiff1d(np.arange(len(lengths)), kept)
    long_and_kept = np.setdiff1d(too_long, gone)
    dropped = too_long if policy == "drop" else too_long[:0]
    return OverflowReport(
        policy=policy,
        max_length=max_length,
        num_rows=len(lengths),
        truncated=long_and_kept.tolist() if policy == "truncate" else [],
        split=long_and_kept.tolist() if policy in ("split", "split_with_prompt") else [],
        dropped=dropped.tolist(),
        masked=np.setdiff1d(gone, dropped).tolist(),
        source_rows=kept.tolist(),
    )


def _refuse_long(lengths: Integers, max_length: int, ids: Sequence[Any] | None) -> None:
    too_long = np.flatnonzero(lengths > max_length)
    if not len(too_long):
        return
    row = int(too_long[0])
    name = "" if ids is None else f" (id {str(ids[row])!r})"
    raise ValueError(
        f"{len(too_long)} rows are longer than {max_length} tokens; the first is row {row}{name} with {lengths[row]}, "
        f"the longest has {lengths.max()}. Raise max_length (of the rows, "
        f"{kept_by_length(lengths, lambda limit: float((lengths <= limit).mean()), max_length)}), or choose overflow "
        "truncate, split, split_with_prompt or drop."
    )


def kept_by_length(lengths: Integers, kept_at: Callable[[int], float], above: int) -> str:
    """Describe what higher limits keep: 512, 1,024, 2,048, ... and the length that keeps all.

    Args:
        lengths: `(num_documents,)` number of tokens in each document.
        kept_at: Function from a limit to the share that it keeps.
        above: Limits up to this one are not listed.
    """
    longest = int(lengths.max())
    limits = [1 << power for power in range(9, 31) if above < 1 << power < longest]
    # a share that rounds to all, and is not, is shown as less
    shares = [f"{limit:,} keeps {min(kept_at(limit), 0.999):.1%}" for limit in limits]
    return ", ".join([*shares, f"{longest:,} keeps all"])


def truncate_dataset(dataset: Dataset | IterableDataset, max_length: int) -> Dataset | IterableDataset:
    """Truncate the token columns of every row to `max_length` tokens; no row is dropped.

    Args:
        dataset: Tokenized rows, streamed or not.
        max_length: Limit in tokens.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, found {max_length}")
    if isinstance(dataset, IterableDataset):
        return dataset.map(partial(_truncate_batch, max_length=max_length), batched=True)
    columns = token_columns(dataset)
    lengths = columns["input_ids"].lengths()
    if not (lengths > max_length).any():
        return dataset
    plan = RowPlan(cut_pieces(lengths, max_length, "truncate"), np.arange(1, len(lengths) + 1))
    return materialize(dataset, plan, carry=dataset.remove_columns(list(columns)))


def _truncate_batch(batch: dict[str, list[Any]], max_length: int) -> dict[str, list[Any]]:
    return {name: [row[:max_length] for row in batch[name]] for name in TOKEN_COLUMNS if name in batch}


def plan_bfd(lengths: Sequence[int] | Integers, seq_length: int) -> list[list[int]]:
    """Assign documents to rows by best-fit decreasing: longest first, each to the row where it leaves the least room.

    Deterministic: documents of equal length are taken in order, and of rows with equal room the one opened last is
    used. O(n log n) apart from moves within a list of at most `seq_length` numbers; 100,000 documents take a fraction
    of a second.

    Args:
        lengths: `(num_documents,)` number of tokens in each document, 1 to `seq_length`.
        seq_length: Maximum number of tokens in a row.

    Returns:
        Rows of document numbers, in the order in which rows were opened; within a row, longest document first.

    Raises:
        ValueError: A document is empty or longer than a row.
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
    rooms: list[int] = []  # the distinct amounts of free room, sorted
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
    """Record that a row has this much free room, unless it is full."""
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
        dataset: Rows with `input_ids` and optionally other token columns (`sft.tokens.columns.TOKEN_COLUMNS`); other
            columns are dropped.
        seq_length: Maximum number of tokens in a row.
        strategy: `bfd` (best-fit decreasing; longer documents are truncated to `seq_length`), `bfd_split` (longer
            documents are split, and nothing is lost), `in_order` (each row gets the next documents that fit, so that
            their order stays; longer documents are truncated), `wrapped` (in the given order, split wherever a row is
            full).
        buffer_size: Number of documents of a streamed data set that are packed at a time.

    Returns:
        Rows with `input_ids`, `labels`, `seq_lengths` and the other token columns of the source.

    Raises:
        ValueError: The strategy is unknown, `seq_length` is below 1, or there are no `input_ids`.
    """
    if isinstance(dataset, IterableDataset):
        _check_options(seq_length, strategy)
        pack = partial(_pack_batch, seq_length=seq_length, strategy=strategy)
        names = dataset.column_names or list(next(iter(dataset)))
        return dataset.map(pack, batched=True, batch_size=buffer_size, remove_columns=names)
    return pack_with_plan(dataset, seq_length, strategy)[0]


def pack_with_plan(dataset: Dataset, seq_length: int, strategy: str = "bfd") -> tuple[Dataset, list[list[int]]]:
    """Pack as `pack_dataset` does, and also return which documents are in each row.

    Returns:
        The packed data set, and for every row the source rows of its documents in order (a source row that was split
        appears once for each of its pieces).
    """
    plan = plan_rows(whole(token_columns(dataset)["input_ids"].lengths()), seq_length, strategy)
    members = [part.tolist() for part in np.split(plan.pieces.document, plan.ends[:-1])] if len(plan.ends) else []
    return materialize(dataset, plan), members


def limit_and_pack(
    dataset: Dataset,
    max_length: int,
    strategy: str = "bfd",
    *,
    keep_end: bool = False,
    groups: Integers | None = None,
    overflow: str | None = None,
) -> tuple[Dataset, OverflowReport]:
    """Apply the length limit, drop documents in which nothing is trained, and pack; every token is moved once.

    Args:
        dataset: Tokenized rows.
        max_length: Maximum number of tokens in a row. `bfd` and `in_order` truncate longer documents, `bfd_split` and
            `wrapped` split them.
        strategy: As in `pack_dataset`.
        keep_end: Whether `bfd` and `in_order` keep the end of a document that they truncate instead of its beginning.
        groups: See `plan_rows`; one number per document.
        overflow: What `bfd` and `in_order` do with longer documents, see `apply_overflow`; None = truncate them.

    Returns:
        The packed data set, and a report on the limit.
    """
    _check_options(max_length, strategy)
    columns = token_columns(dataset)
    # `wrapped` splits documents wherever a row is full, so the limit does not apply to them
    longest = int(columns["input_ids"].lengths().max(initial=1))
    limit = max(longest, max_length) if strategy == "wrapped" else max_length
    policy = "split" if strategy == "bfd_split" else overflow or "truncate"
    ids = dataset["id"] if "id" in dataset.column_names else None
    limited = plan_overflow(columns, limit, policy, ids, keep_end=keep_end)
    plan = plan_rows(limited.pieces, max_length, strategy, None if groups is None else groups[limited.source])
    return materialize(dataset, plan, columns=limited.columns), limited.report


def plan_rows(pieces: Pieces, seq_length: int, strategy: str = "bfd", groups: Integers | None = None) -> RowPlan:
    """Plan which pieces of documents share a row, without moving tokens.

    Args:
        pieces: Parts of documents, each packed as one document.
        seq_length: Maximum number of tokens in a row.
        strategy: As in `pack_dataset`.
        groups: `(num_documents,)` documents with the same number begin with the same tokens. They are packed next to
            each other, as many as fit into a row, so that the beginning is computed once (`sft.batches.shared_tokens`).
            None = no such documents. `in_order` and `wrapped` keep the order of documents and do not look at it.

    Raises:
        ValueError: The strategy is unknown, or `seq_length` is below 1.
    """
    _check_options(seq_length, strategy)
    if strategy == "wrapped":
        plan = _plan_wrapped(pieces.length, seq_length)
    elif strategy == "in_order":
        plan = _plan_in_order(pieces.length, seq_length)
    else:
        plan = _plan_best_fit(pieces.length, seq_length, strategy, None if groups is None else groups[pieces.document])
    return RowPlan(plan.pieces.within(pieces), plan.ends)


def _check_options(seq_length: int, strategy: str) -> None:
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, found {seq_length}")
    if strategy not in PACKING_STRATEGIES:
        raise ValueError(f"packing strategy {strategy!r} is unknown; use one of {', '.join(PACKING_STRATEGIES)}")


def _plan_best_fit(lengths: Integers, seq_length: int, strategy: str, groups: Integers | None) -> RowPlan:
    policy = "split" if strategy == "bfd_split" else "truncate"
    pieces = cut_pieces(lengths, seq_length, policy)
    pieces = pieces[pieces.length > 0]
    if groups is None:
        bundles: Integers = np.arange(len(pieces))
    else:
        pieces = pieces[np.argsort(groups[pieces.document], kind="stable")]
        bundles = _bundle(pieces.length, groups[pieces.document], seq_length)
    ends = np.append(bundles[1:], len(pieces))
    sizes = np.add.reduceat(pieces.length, bundles) if len(pieces) else pieces.length
    bins = plan_bfd(sizes, seq_length)
    order = np.array([piece for row in bins for part in row for piece in range(bundles[part], ends[part])], np.int64)
    counts = [sum(int(ends[part] - bundles[part]) for part in row) for row in bins]
    return RowPlan(pieces[order], np.cumsum(counts, dtype=np.int64))


def _bundle(lengths: Integers, groups: Integers, seq_length: int) -> Integers:
    """Return the first piece of each bundle: neighbours of one group that together fit into a row."""
    starts, size = [], seq_length + 1
    for place, (length, is_same) in enumerate(zip(lengths.tolist(), np.diff(groups, prepend=-1) == 0, strict=True)):
        size += length
        if not is_same or size > seq_length:
            starts.append(place)
            size = length
    return np.array(starts, dtype=np.int64)


def _plan_in_order(lengths: Integers, seq_length: int) -> RowPlan:
    """Fill rows with the documents in their order; one that does not fit any more begins the next row."""
    pieces = cut_pieces(lengths, seq_length, "truncate")
    pieces = pieces[pieces.length > 0]
    starts = _bundle(pieces.length, np.zeros(len(pieces), dtype=np.int64), seq_length)
    return RowPlan(pieces, np.append(starts[1:], len(pieces)) if len(pieces) else starts)


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
