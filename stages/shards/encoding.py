"""Tokenization of rendered chats into documents, and the rows that documents are packed into."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.chat.render import Rendered, Span, TrainOn
from sft.labels import IGNORE_INDEX
from sft.models.checkpoint import load_image_processor
from sft.tokens.columns import Columns, Integers, Pieces, RowPlan
from sft.tokens.encoding import Encoder, TokenBatch
from sft.tokens.packing import Limited, plan_overflow, plan_rows
from sft.tokens.store import TokenStore
from stages.checkout.ledger import Action, Ledger
from stages.params.schema import PackSection
from stages.progress import progress
from stages.shards.shards import Rows, count_lines, run_shards, shards_of

BATCH_SIZE = 1000

ACTIONS = {
    "truncated": Action.CUT,
    "split": Action.SPLIT,
    "divided": Action.SPLIT,
    "dropped": Action.DROP,
    "masked": Action.DROP,
}
"""Reason of a ledger entry -> what was done to the document."""


class EncodedShard(NamedTuple):
    """The tokenized documents of a shard.

    Args:
        ids: Ids of their records.
        turns: The message of each that is trained, if its record became several documents; else -1.
        batches: Their tokens, in batches.
        crossings: Id and detail of each document in which a token lies across the border of what is trained.
        images: Text, images and end of the images of each document; empty if no row has images.
    """

    ids: list[str]
    turns: list[int]
    batches: list[TokenBatch]
    crossings: list[tuple[str, str]]
    images: list[DocumentImages]


class DocumentImages(NamedTuple):
    """Images of a document.

    Args:
        text: Its text, with one placeholder per image; empty if it has no images.
        names: Names of their files.
        end: Number of tokens up to the last one of an image.
    """

    text: str = ""
    names: tuple[str, ...] = ()
    end: int = 0


@dataclass(frozen=True)
class ImageFiles:
    """Where images are, and the base model that reads them.

    Args:
        model: Folder of the base model, which has its processor.
        folder: Folder of the images.
    """

    model: Path
    folder: Path


@dataclass(frozen=True)
class EncodingWork:
    """Work that tokenizes shards of rendered chats.

    Args:
        tokenizer: Folder of the tokenizer.
        image_files: Where images are; None = no row has images.
    """

    tokenizer: Path
    image_files: ImageFiles | None = None

    def build(self) -> ShardEncoder:
        """Load the tokenizer, and the processor if rows have images."""
        return ShardEncoder(AutoTokenizer.from_pretrained(self.tokenizer), self.image_files)


class ShardEncoder:
    """Tokenizer of the rendered chats of a shard."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_files: ImageFiles | None = None) -> None:
        self._encoder = Encoder(tokenizer)
        self._images = ImageEncoder(tokenizer, image_files) if image_files is not None else None

    def __call__(self, shard: Rows) -> EncodedShard:
        """Tokenize and mask all rows of a shard."""
        encoded = EncodedShard([], [], [], [], [])
        rows = shard.rows()
        while batch := list(itertools.islice(rows, BATCH_SIZE)):
            encoded.ids.extend(row["id"] for row in batch)
            encoded.turns.extend(row.get("turn", -1) for row in batch)
            if self._images is None:
                tokens = self._encoder.encode_flat([Rendered.from_row(row) for row in batch])
            else:
                tokens = self._images.encode(batch, encoded.images)
            encoded.batches.append(tokens)
            encoded.crossings.extend((batch[number]["id"], detail) for number, detail in tokens.crossings.items())
        return encoded


class ImageEncoder:
    """Tokenizer of rows some of which have images, as the library's collator of rows with images tokenizes them.

    Args:
        tokenizer: Tokenizer of the run.
        files: Where images are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, files: ImageFiles) -> None:
        from sft.vision.collator import VisionEncoder  # only for rows with images

        self._encoder = VisionEncoder(load_image_processor(files.model, tokenizer))
        self._folder = files.folder

    def encode(self, rows: Sequence[Mapping[str, Any]], images: list[DocumentImages]) -> TokenBatch:
        """Tokenize rows one by one, so that the images of one row are in memory at a time.

        Args:
            rows: Rows that `format` wrote.
            images: Gets the images of each row.
        """
        from sft.vision.chat import VisionRow
        from sft.vision.images import read_image

        batches: list[TokenBatch] = []
        for row in rows:
            rendered = self._encoder.as_printed(Rendered.from_row(row))
            is_whole = rendered.spans == [Span(0, len(rendered.text))]
            names = tuple(row.get("images", ()))
            decoded = [read_image(self._folder / name) for name in names]
            train_on = TrainOn.ALL if is_whole else TrainOn.ASSISTANT
            encoded = self._encoder.encode([VisionRow(row["id"], rendered, train_on, decoded)])
            tokens = encoded.tokens[0]
            batches.append(token_batch(tokens, encoded.crossings))
            places = [
                place for place, token in enumerate(tokens["input_ids"]) if token in self._encoder.image_token_ids
            ]
            found = DocumentImages(rendered.text, names, places[-1] + 1 if places else 0)
            images.append(found if names else DocumentImages())
        return joined(batches)


def token_batch(tokens: Mapping[str, Any], crossings: dict[int, str]) -> TokenBatch:
    """Return one token row as a batch."""
    ids, labels = (np.array(tokens[name], dtype=np.int32) for name in ("input_ids", "labels"))
    weights = np.array(tokens["loss_weights"], dtype=np.float32) if "loss_weights" in tokens else None
    return TokenBatch(np.array([len(ids)], dtype=np.int64), ids, labels, weights, crossings)


def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Join batches of one document each."""
    weighted = any(batch.loss_weights is not None for batch in batches)
    weights = [
        (batch.labels != IGNORE_INDEX).astype(np.float32) if batch.loss_weights is None else batch.loss_weights
        for batch in batches
    ]
    return TokenBatch(
        np.concatenate([batch.lengths for batch in batches]),
        np.concatenate([batch.input_ids for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        np.concatenate(weights) if weighted else None,
        {number: batch.crossings[0] for number, batch in enumerate(batches) if batch.crossings},
    )


@dataclass(frozen=True)
class Documents:
    """All documents of a split.

    Args:
        ids: `(num_documents,)` ids of their records.
        columns: Token columns.
        lengths: `(num_documents,)` numbers of tokens.
        trained: `(num_documents,)` numbers of trained tokens.
        num_crossed: Number of documents in which a token lies across the border of what is trained.
        images: Images of each document; empty if no row has images.
        groups: `(num_documents,)` number of the record of each document; None if no record became several documents.
    """

    ids: pa.ChunkedArray
    columns: Columns
    lengths: Integers
    trained: Integers
    num_crossed: int
    images: list[DocumentImages]
    groups: Integers | None = None


def encode_split(
    path: Path,
    tokenizer: Path,
    scratch: Path,
    section: PackSection,
    ledger: Ledger,
    image_files: ImageFiles | None = None,
) -> Documents:
    """Tokenize a file of rendered chats, in several processes if the section says so.

    Args:
        path: File of rows that `format` wrote.
        tokenizer: Folder of the tokenizer.
        scratch: Folder for the files of the token columns, which must exist as long as the documents are read.
        section: The section `pack` of params.yaml.
        ledger: Gets an entry for each document in which a token lies across the border of what is trained.
        image_files: Where images are; None = no row has images.
    """
    scratch.mkdir(parents=True)
    store = TokenStore(scratch)
    ids: list[str] = []
    turns: list[int] = []
    images: list[DocumentImages] = []
    num_crossed, num_rows = 0, count_lines(path)
    progress(0, num_rows, f"{path.stem} rows tokenized")
    work = EncodingWork(tokenizer, image_files)
    for encoded in run_shards(work, shards_of(path), section.num_proc, section.workers):
        ids += encoded.ids
        turns += encoded.turns
        images.extend(encoded.images)
        for batch in encoded.batches:
            store.append(batch)
        num_crossed += len(encoded.crossings)
        progress(len(ids), num_rows, f"{path.stem} rows tokenized")
        for row_id, detail in encoded.crossings:
            ledger.enter(row_id, "border_in_token", detail, Action.WARN, tokens_lost=0, trained_tokens_lost=0)
    columns = store.columns()
    return Documents(
        pa.chunked_array([pa.array(ids, type=pa.string())]),
        columns,
        columns["input_ids"].lengths(),
        store.trained(),
        num_crossed,
        images,
        groups_of_turns(ids, turns),
    )


def groups_of_turns(ids: list[str], turns: list[int]) -> Integers | None:
    """Number the records of documents; None if each document is a record.

    Args:
        ids: `(num_documents,)` ids of the records. A record may be repeated.
        turns: `(num_documents,)` trained message of each document, which grows within a record; -1 = the whole record.
    """
    if all(turn < 0 for turn in turns):
        return None
    documents = list(zip(ids, turns, strict=True))
    is_next = [
        row_id == before and turn > previous
        for (before, previous), (row_id, turn) in itertools.pairwise([("", -1), *documents])
    ]
    return np.cumsum(~np.array(is_next))


class Kept:
    """Sequence of the pieces that the length limit left of documents, each as a row with id, place and tokens.

    Args:
        documents: The documents.
        pieces: The pieces that are left of them.
        whole: `(num_documents,)` number of tokens before the limit in the document of each.
    """

    def __init__(self, documents: Documents, pieces: Pieces, whole: Integers) -> None:
        self._documents = documents
        self._pieces = pieces
        self._whole = whole

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> dict[str, Any]:
        piece = self._pieces[number : number + 1]
        tokens = {name: column.gather(piece, np.int32).tolist() for name, column in self._documents.columns.items()}
        document = int(piece.document[0])
        place = {"start": int(piece.start[0]), "num_in_document": int(self._whole[document])}
        return {"id": self._documents.ids[document].as_py(), **place, **tokens}


class Packed(NamedTuple):
    """Documents within the length limit, and the rows that they are packed into.

    Args:
        limited: What the limit left.
        divided: The documents that the rows are made of: those given, or parts with their prompts.
        plan: The rows.
    """

    limited: Limited
    divided: Documents
    plan: RowPlan


def plan_packing(documents: Documents, section: PackSection) -> Packed:
    """Apply the length limit to documents and plan the rows, without moving tokens.

    Args:
        documents: Tokenized documents.
        section: The section `pack` of params.yaml.

    Raises:
        ValueError: A document is too long, and `pack.overflow` is `error`.
    """
    limited = plan_overflow(documents.columns, section.max_length, section.overflow, documents.ids)
    divided = divided_documents(documents, limited)
    return Packed(limited, divided, plan_split(limited.pieces, section, divided.groups))


def divided_documents(documents: Documents, limited: Limited) -> Documents:
    """Return the documents that rows are made of: those given, or their parts with their prompts."""
    return replace(
        documents,
        columns=dict(limited.columns),
        ids=documents.ids.take(pa.array(limited.source)),
        images=[documents.images[number] for number in limited.source.tolist()] if documents.images else [],
        groups=None if documents.groups is None else documents.groups[limited.source],
    )


def plan_split(pieces: Pieces, section: PackSection, groups: Integers | None = None) -> RowPlan:
    """Choose which pieces share a row; with strategy `none` each piece is a row. `groups` is that of `plan_rows`."""
    if section.strategy == "none":
        return RowPlan(pieces, np.arange(1, len(pieces) + 1))
    return plan_rows(pieces, section.max_length, section.strategy, groups)


class LostTokens(NamedTuple):
    """A document that was cut, divided or dropped.

    Args:
        id: Id of its record.
        reason: `truncated`, `split` (at the length limit), `dropped` (too long), `masked` (nothing in it is trained) or
            `divided` (where a row was full; no token is lost).
        tokens_lost: Number of its tokens that are in no row.
        trained_tokens_lost: How many of those are trained.
    """

    id: str
    reason: str
    tokens_lost: int
    trained_tokens_lost: int


def lost_tokens(ids: pa.ChunkedArray, limited: Limited, plan: RowPlan) -> Iterator[LostTokens]:
    """Yield an entry for every document that the length limit changed or the end of a row divided.

    Args:
        ids: `(num_documents,)` ids of the records.
        limited: What the limit left.
        plan: Rows that are made of it.
    """
    report = limited.report
    for reason, rows in report.row_indices.items():
        for row in rows:
            yield LostTokens(ids[row].as_py(), reason, report.tokens_lost[row], report.trained_tokens_lost[row])
    size = report.num_rows
    packed, kept = limited.source[plan.pieces.document], limited.source[limited.pieces.document]
    divided = np.bincount(packed, minlength=size) > np.bincount(kept, minlength=size)
    for row in np.flatnonzero(divided).tolist():
        yield LostTokens(ids[row].as_py(), "divided", 0, 0)


def enter_lost_tokens(entries: Iterable[LostTokens], ledger: Ledger) -> tuple[int, int]:
    """Write ledger entries of documents that lost tokens; return the numbers of tokens and trained tokens in them."""
    num_tokens = num_trained = 0
    for entry in entries:
        num_lost = {"tokens_lost": entry.tokens_lost, "trained_tokens_lost": entry.trained_tokens_lost}
        ledger.enter(entry.id, entry.reason, None, ACTIONS[entry.reason], **num_lost)
        num_tokens += entry.tokens_lost
        num_trained += entry.trained_tokens_lost
    return num_tokens, num_trained


def without_lengths(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Drop the column `seq_lengths`, which rows of one document each do not need."""
    return (table.drop_columns(["seq_lengths"]) for table in tables)
