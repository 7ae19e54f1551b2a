"""Packed rows of one window of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from sft.chat.checks import TerminatorCheck
from sft.labels import IGNORE_INDEX
from sft.tokens.columns import RaggedColumn, list_array, row_tables
from sft.tokens.encoding import TokenBatch
from stages.checkout.ledger import Action
from stages.shards.encoding import (
    Documents,
    ShardEncoder,
    enter_lost_tokens,
    groups_of_turns,
    lost_tokens,
    plan_packing,
    without_lengths,
)
from stages.shards.rendering import ShardRenderer
from stages.streaming.books import Books
from stages.streaming.recipe import Recipe


class RowsInMemory:
    """Rows that a shard's work is done on, in memory instead of in a file."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""
        return iter(self._rows)


class WindowPacker:
    """Rendering, tokenization and packing of a window's records, as `format` and `pack` do it with all records.

    Args:
        recipe: How rows are rendered and packed.
        with_weights: Whether the first rows, which `pack` packed, have `loss_weights`.
    """

    def __init__(self, recipe: Recipe, *, with_weights: bool) -> None:
        self._recipe = recipe
        self._with_weights = with_weights
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.work.tokenizer, trust_remote_code=recipe.work.trust_remote_code
        )
        self._render = ShardRenderer(tokenizer, recipe.work)
        self._encode = ShardEncoder(tokenizer)
        self._check = TerminatorCheck(tokenizer, recipe.work.stop_token_ids)

    def pack(self, records: Sequence[dict[str, Any]], books: Books | None) -> pa.Table | None:
        """Return the packed rows; None if nothing of the window is trained.

        Args:
            records: Valid records.
            books: Gets the counts and ledger entries; None = they are not wanted.

        Raises:
            ValueError: A record can't be rendered, or a trained turn does not end in a stop token.
        """
        rendered = self._render(RowsInMemory(records))
        self._check.join(rendered.check)
        self._check.finish()
        if books is not None:
            books.counts.update(records=len(records), unrolled=rendered.num_unrolled)
            for entry in rendered.entries:
                books.ledgers["format"].enter(*entry)
            for row_id, detail, tokens in rendered.thinking_removed:
                books.ledgers["format"].enter(row_id, "thinking_removed", detail, Action.REPAIR, tokens=tokens)
                books.counts["thinking_removed_tokens"] += tokens
        encoded = self._encode(RowsInMemory([json.loads(row) for row in rendered.rows]))
        if not encoded.ids:
            return None
        if books is not None:
            for row_id, detail in encoded.crossings:
                books.ledgers["pack"].enter(
                    row_id, "border_in_token", detail, Action.WARN, tokens_lost=0, trained_tokens_lost=0
                )
        documents = self._documents(encoded.ids, encoded.turns, joined_batches(encoded.batches))
        return self._rows(documents, books)

    def _documents(self, ids: list[str], turns: list[int], tokens: TokenBatch) -> Documents:
        ends = np.concatenate([[0], np.cumsum(tokens.lengths)])
        values = {"input_ids": tokens.input_ids, "labels": tokens.labels}
        is_trained = tokens.labels != IGNORE_INDEX
        if self._with_weights:
            values["loss_weights"] = weights_of(tokens)
        elif tokens.loss_weights is not None:
            raise ValueError(
                "rows of the stream have weights, and the first load.streaming_window rows have none: put a row with "
                "a weight among them, or raise load.streaming_window"
            )
        columns = {
            name: RaggedColumn(name, pa.chunked_array([list_array(ends, array)]), None)
            for name, array in values.items()
        }
        running = np.concatenate([[0], np.cumsum(is_trained)])
        trained = running[ends[1:]] - running[ends[:-1]]
        return Documents(
            pa.chunked_array([pa.array(ids, type=pa.string())]),
            columns,
            columns["input_ids"].lengths(),
            trained,
            0,
            [],
            groups_of_turns(ids, turns),
        )

    def _rows(self, documents: Documents, books: Books | None) -> pa.Table | None:
        packed = plan_packing(documents, self._recipe.pack)
        report = packed.limited.report
        if books is not None:
            entered = enter_lost_tokens(lost_tokens(documents.ids, packed.limited, packed.plan), books.ledgers["pack"])
            books.counts.update(
                documents=len(packed.limited.pieces),
                rows=len(packed.plan.ends),
                tokens=int(packed.limited.pieces.length.sum()),
                trained_tokens=int(documents.trained.sum()) - entered[1],
                tokens_lost=entered[0],
                trained_tokens_lost=entered[1],
                trained_tokens_in=int(documents.trained.sum()),
                trained_tokens_cut=report.num_trained_cut,
                tokens_repeated=report.num_repeated,
            )
        if not len(packed.plan.ends):
            return None
        tables = row_tables(packed.limited.columns, packed.plan)
        if self._recipe.pack.strategy == "none":
            tables = without_lengths(tables)
        return pa.concat_tables(tables)


def joined_batches(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Join batches of documents, without their crossings; plain weights are added if another batch has weights."""
    weights = None
    if any(batch.loss_weights is not None for batch in batches):
        weights = np.concatenate([weights_of(batch) for batch in batches])
    return TokenBatch(
        np.concatenate([batch.lengths for batch in batches]),
        np.concatenate([batch.input_ids for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        weights,
        {},
    )


def weights_of(batch: TokenBatch) -> np.ndarray[Any, Any]:
    """Return the weights of a batch's tokens: 1 for trained ones unless the batch states others."""
    return (batch.labels != IGNORE_INDEX).astype(np.float32) if batch.loss_weights is None else batch.loss_weights
