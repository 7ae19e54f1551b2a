"""`pack`: rendered chats -> tokenized, masked, packed rows.

What became of every token: the ledger's entries of `pack`, and the way back from a packed token to its record.
"""

from __future__ import annotations

import itertools
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import load_from_disk
from transformers import AutoTokenizer

from sft.labels import IGNORE_INDEX
from sft.tokens.columns import Pieces, RowPlan, row_tables, write_rows
from sft.tokens.packing import OverflowReport, plan_overflow, plan_rows
from sft.tokens.preview import preview_masks
from stages.checkout.artifacts import progress, replacing_folder, write_json, write_jsonl, write_text
from stages.checkout.ledger import Action, Ledger
from stages.checkout.paths import Paths
from stages.pages.data import SplitFacts, choose_previews, write_data_page
from stages.params.schema import PackSection, Params
from stages.shards.encoding import Documents, Kept, encode_split

ACTIONS = {
    "truncated": Action.CUT,
    "split": Action.SPLIT,
    "divided": Action.SPLIT,
    "dropped": Action.DROP,
    "masked": Action.DROP,
}
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


SPLITS = ("train", "eval")

SCRATCH = "scratch"

CROSSED = (
    "in {} documents a token lies across the border of what is trained, so that their prompts end in other tokens when "
    "the model generates; border_in_token in outs/pack/ledger.jsonl names them, docs/data.md says more"
)


def run(params: Params, paths: Paths) -> None:
    """Write outs/pack: packed rows, an index from tokens to record ids, a preview of the masks; and the figures."""
    tokenizer_folder = paths.out("format", "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    splits: dict[str, SplitFacts] = {}
    with replacing_folder(paths.out("pack")) as folder, Ledger(folder / "ledger.jsonl", "pack") as ledger:
        for number, split in enumerate(SPLITS):
            progress(number, len(SPLITS), f"packing {split}")
            rendered = paths.out("format", f"{split}.jsonl")
            documents = encode_split(rendered, tokenizer_folder, folder / SCRATCH / split, params.pack, ledger)
            splits[split], kept = pack_split(documents, params.pack, split, folder, ledger)
            if split == "train":
                packed = load_from_disk(str(folder / split))
                write_text(folder / "preview.txt", preview_masks(packed, tokenizer, num_rows=3, seed=0))
                previews = choose_previews(kept, tokenizer)
        shutil.rmtree(folder / SCRATCH)
    write_json(paths.metrics("pack"), {split: facts.figures for split, facts in splits.items()})
    write_data_page(paths, splits, previews)
    num_crossed = sum(facts.figures["border_in_token"] for facts in splits.values())
    if num_crossed:
        print(f"warning: {CROSSED.format(num_crossed)}", flush=True)
    progress(len(SPLITS), len(SPLITS), summary(splits["train"].figures))


def summary(figures: Mapping[str, Any]) -> str:
    """One line about the training rows."""
    return (
        f"{figures['documents']} documents, {figures['tokens']} tokens ({figures['trained_tokens']} trained) "
        f"in {figures['rows']} rows, fill {figures['fill']:.3f}"
    )


def pack_split(
    documents: Documents, section: PackSection, split: str, folder: Path, ledger: Ledger
) -> tuple[SplitFacts, Kept]:
    """Apply the length limit, pack, write; every token is in a row or in the ledger.

    Returns:
        What is known of the packed rows, and the documents as the limit left them.

    Raises:
        ValueError: Nothing trainable is left, or more trained tokens were cut than `max_lost_fraction` allows.
    """
    pieces, report = plan_overflow(documents.columns, section.max_length, section.overflow, documents.ids)
    plan = plan_split(pieces, section)
    before = np.array([documents.lengths.sum(), documents.trained.sum()])
    lost = np.array([report.num_tokens_lost, sum(report.trained_tokens_lost.values())])
    check_losses(int(before[1]), int(lost[1]), section, losses(documents.ids, report, pieces, plan), split)
    entered = np.zeros(2, dtype=np.int64)
    for entry in losses(documents.ids, report, pieces, plan):
        lost_tokens = {"tokens_lost": entry.tokens_lost, "trained_tokens_lost": entry.trained_tokens_lost}
        ledger.enter(entry.id, entry.reason, None, ACTIONS[entry.reason], **lost_tokens)
        entered += list(lost_tokens.values())
    count = RowCount()
    tables = row_tables(documents.columns, plan)
    write_rows(count.through(tables if section.strategy != "none" else without_lengths(tables)), folder / split)
    written = np.array([count.filled().sum(), count.num_trained])
    assert (before == written + entered).all(), f"{before} tokens (trained) in, {written} out, {entered} in the ledger"
    write_jsonl(folder / f"{split}_index.jsonl", index_entries(documents.ids, plan))
    figures = {
        "documents": len(pieces),
        "rows": len(plan.ends),
        "tokens": int(written[0]),
        "trained_tokens": int(written[1]),
        "fill": int(written[0]) / (len(plan.ends) * section.max_length),
        "truncated": report.num_truncated,
        "split": report.num_split,
        "dropped": report.num_dropped,
        "border_in_token": documents.num_crossed,
        "tokens_lost": int(lost[0]),
        "trained_tokens_lost": int(lost[1]),
    }
    return SplitFacts(figures, documents.lengths, documents.trained, count.filled()), Kept(documents, pieces)


def plan_split(pieces: Pieces, section: PackSection) -> RowPlan:
    """Which pieces share a row; one row a piece without packing."""
    if section.strategy == "none":
        return RowPlan(pieces, np.arange(1, len(pieces) + 1))
    return plan_rows(pieces, section.max_length, section.strategy)


def without_lengths(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Rows of one document each say nothing of the documents in them."""
    return (table.drop_columns(["seq_lengths"]) for table in tables)


class RowCount:
    """Counts tokens and trained tokens of rows on their way to the disk."""

    def __init__(self) -> None:
        self.num_trained = 0
        self._filled: list[np.ndarray[Any, Any]] = [np.zeros(0, dtype=np.int64)]

    def through(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Count tables and hand them on."""
        for table in tables:
            for chunk in table.column("labels").chunks:
                self._filled.append(np.diff(chunk.offsets.to_numpy()).astype(np.int64))
                self.num_trained += int((chunk.flatten().to_numpy() != IGNORE_INDEX).sum())
            yield table

    def filled(self) -> np.ndarray[Any, Any]:
        """Tokens in each row, `(num_rows,)`."""
        return np.concatenate(self._filled)


def check_losses(trained: int, lost: int, section: PackSection, entries: Iterator[Lost], split: str) -> None:
    """Stop when the length limit took too much, or everything.

    Args:
        trained: Trained tokens before the limit.
        lost: How many of them it took.
        section: The section `pack` of params.yaml.
        entries: What the ledger will say.
        split: train or eval.

    Raises:
        ValueError: Says how much was lost, to what, and which parameter to change.
    """
    first = ", ".join(f"{entry.id} ({entry.reason})" for entry in itertools.islice(entries, 3))
    if lost == trained:
        raise ValueError(
            f"no trainable token is left in the {split} rows: all {trained} were lost at pack.max_length "
            f"{section.max_length}; first rows: {first}; raise pack.max_length"
        )
    if lost / trained > section.max_lost_fraction:
        raise ValueError(
            f"{lost / trained:.1%} of the trained tokens of the {split} rows are lost at pack.max_length "
            f"{section.max_length}, more than pack.max_lost_fraction {section.max_lost_fraction:.1%} allows; "
            f"first rows: {first}; raise pack.max_length, set pack.overflow to split, or raise pack.max_lost_fraction"
        )
