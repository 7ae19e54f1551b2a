"""Tokenization of the rendered chats of a split into documents whose tokens are stored in files."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.chat.render import Rendered
from sft.tokens.columns import Integers, Pieces
from sft.tokens.encoding import Encoder, TokenBatch
from sft.tokens.store import FileColumn, TokenStore
from stages.checkout.ledger import Action, Ledger
from stages.params.schema import PackSection
from stages.shards.shards import Shard, run_shards, shards_of

BATCH_SIZE = 1000


class EncodedShard(NamedTuple):
    """The tokenized documents of a shard.

    Args:
        ids: Ids of their records.
        turns: The message of each that is trained, if its record became several documents; else -1.
        batches: Their tokens, in batches.
        crossings: Id and detail of each document in which a token lies across the border of what is trained.
    """

    ids: list[str]
    turns: list[int]
    batches: list[TokenBatch]
    crossings: list[tuple[str, str]]


@dataclass(frozen=True)
class EncodingWork:
    """Work that tokenizes shards of rendered chats.

    Args:
        tokenizer: Folder of the tokenizer.
    """

    tokenizer: Path

    def build(self) -> ShardEncoder:
        """Load the tokenizer."""
        return ShardEncoder(AutoTokenizer.from_pretrained(self.tokenizer))


class ShardEncoder:
    """Tokenizer of the rendered chats of a shard."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)

    def __call__(self, shard: Shard) -> EncodedShard:
        """Tokenize and mask all rows of a shard."""
        encoded = EncodedShard([], [], [], [])
        rows = shard.rows()
        while batch := list(itertools.islice(rows, BATCH_SIZE)):
            encoded.ids.extend(row["id"] for row in batch)
            encoded.turns.extend(row.get("turn", -1) for row in batch)
            tokens = self._encoder.encode_flat([Rendered.from_row(row) for row in batch])
            encoded.batches.append(tokens)
            encoded.crossings.extend((batch[number]["id"], detail) for number, detail in tokens.crossings.items())
        return encoded


@dataclass(frozen=True)
class Documents:
    """All documents of a split.

    Args:
        ids: `(num_documents,)` ids of their records.
        columns: Token columns.
        lengths: `(num_documents,)` numbers of tokens.
        trained: `(num_documents,)` numbers of trained tokens.
        num_crossed: Number of documents in which a token lies across the border of what is trained.
        groups: `(num_documents,)` number of the record of each document; None if no record became several documents.
    """

    ids: pa.ChunkedArray
    columns: dict[str, FileColumn]
    lengths: Integers
    trained: Integers
    num_crossed: int
    groups: Integers | None = None


def encode_split(path: Path, tokenizer: Path, scratch: Path, section: PackSection, ledger: Ledger) -> Documents:
    """Tokenize a file of rendered chats, in several processes if the section says so.

    Args:
        path: File of rows that `format` wrote.
        tokenizer: Folder of the tokenizer.
        scratch: Folder for the files of the token columns, which must exist as long as the documents are read.
        section: The section `pack` of params.yaml.
        ledger: Gets an entry for each document in which a token lies across the border of what is trained.
    """
    scratch.mkdir(parents=True)
    store = TokenStore(scratch)
    ids: list[str] = []
    turns: list[int] = []
    num_crossed = 0
    for encoded in run_shards(EncodingWork(tokenizer), shards_of(path), section.num_proc, section.workers):
        ids += encoded.ids
        turns += encoded.turns
        for batch in encoded.batches:
            store.append(batch)
        num_crossed += len(encoded.crossings)
        for row_id, detail in encoded.crossings:
            ledger.enter(row_id, "border_in_token", detail, Action.WARN, tokens_lost=0, trained_tokens_lost=0)
    columns = store.columns()
    return Documents(
        pa.chunked_array([pa.array(ids, type=pa.string())]),
        columns,
        columns["input_ids"].lengths(),
        store.trained(),
        num_crossed,
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
    """

    def __init__(self, documents: Documents, pieces: Pieces) -> None:
        self._documents = documents
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> dict[str, Any]:
        piece = self._pieces[number : number + 1]
        tokens = {name: column.gather(piece, np.int32).tolist() for name, column in self._documents.columns.items()}
        document = int(piece.document[0])
        place = {"start": int(piece.start[0]), "num_in_document": int(self._documents.lengths[document])}
        return {"id": self._documents.ids[document].as_py(), **place, **tokens}
