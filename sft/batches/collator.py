"""Collator of tokenized rows: pads them to the longest, or joins them into one flat row without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from sft.batches.shared_tokens import share_tokens
from sft.labels import IGNORE_INDEX, LOSS_GROUPS, TEACHER_ROWS, TOKEN_MASKS

Array = np.ndarray[Any, Any]
Row = Mapping[str, Any]


@dataclass
class DataCollatorForSFT:
    """Collate tokenized rows into a batch.

    A padded batch (`padding_free=False`, and no row has `seq_lengths`) has `input_ids`, `labels` and `attention_mask`,
    each `(batch, longest)`. Labels of padding are ignored. So is the first label of a row that is padded on the left,
    which would be predicted from padding.

    A flat batch (`padding_free=True`, or packed rows) is ONE row of all documents. It has `input_ids`, `labels` and
    `position_ids`, each `(1, total)`, and `seq_lengths` `(num_documents,)`. Positions restart at 0 with each document.
    It has no attention mask, since the lengths define which tokens are visible. The first label of each document is
    ignored: it would be predicted from the last token of the document before it.

    `loss_weights` (float32, shaped like the labels) are in the batch if any row has them. So are `teacher_rows`
    (int64), which are -1 in rows without them.

    Attributes:
        pad_token_id: Padding of `input_ids`; never trained and never attended to.
        padding_free: Whether to join the rows instead of padding them.
        pad_to_multiple_of: Pad to a multiple of this many tokens; a flat row gets one more, untrained document.
        return_position_ids: Whether padded batches have `position_ids` too (flat ones always have them).
        padding_side: Side on which padded batches are padded, `right` or `left`.
        share_tokens: Whether flat batches also have the columns of `sft.batches.shared_tokens.SharedTokens`, which list
            the tokens to compute. Has no effect together with `pad_to_multiple_of`.
    """

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    return_position_ids: bool = False
    share_tokens: bool = False
    padding_side: str = "right"

    def __call__(self, features: Sequence[Row], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Collate rows.

        Args:
            features: Rows with `input_ids`, and optionally `labels`, `seq_lengths`, `loss_weights`, `teacher_rows`,
                `attention_mask` and token masks.
            return_tensors: `pt`.

        Raises:
            ValueError: A row is malformed; the message names its position in the batch.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; batches are PyTorch tensors ('pt')")
        rows = [read_row(row, place) for place, row in enumerate(features)]
        if self.padding_free or any("seq_lengths" in row for row in features):
            lengths = [document_lengths(row, len(rows[place].input_ids), place) for place, row in enumerate(features)]
            flat = join_rows(rows, np.concatenate(lengths), self.pad_token_id, self.pad_to_multiple_of)
            return flat_batch(flat, shared=self.share_tokens and self.pad_to_multiple_of is None)
        return padded_batch(rows, self)


NUMBERS = (TEACHER_ROWS, LOSS_GROUPS)
"""Columns with a number per token, -1 = none."""


@dataclass(frozen=True)
class TokenRow:
    """One row as arrays `(length,)`.

    `weights` is None if every token weighs 1. `numbers` has the columns of `NUMBERS` that the row has.
    """

    input_ids: Array
    labels: Array
    weights: Array | None
    numbers: Mapping[str, Array] = field(default_factory=dict)


def read_row(row: Row, place: int) -> TokenRow:
    """Convert one row of a data set to arrays, and apply its token masks to its labels.

    Args:
        row: Row with `input_ids`.
        place: Position of the row in the batch, for messages.

    Raises:
        ValueError: The row is empty, or a column differs in length from `input_ids`.
    """
    if "input_ids" not in row:
        raise ValueError(f"row {place} of the batch has no 'input_ids', only {sorted(row)}; is the data set tokenized?")
    input_ids = _array(row["input_ids"], np.int64)
    if not len(input_ids):
        raise ValueError(f"row {place} of the batch has no tokens; filter out empty rows first")
    labels = input_ids
    for name in ("labels", *TOKEN_MASKS):
        if row.get(name) is None:
            continue
        values = _aligned(row[name], np.int64, len(input_ids), f"{name!r} of row {place}")
        labels = values if name == "labels" else np.where(values.astype(bool), labels, IGNORE_INDEX)
    weights = row.get("loss_weights")
    if weights is not None:
        weights = _aligned(weights, np.float32, len(input_ids), f"'loss_weights' of row {place}")
    numbers = {
        name: _aligned(row[name], np.int64, len(input_ids), f"{name!r} of row {place}")
        for name in NUMBERS
        if row.get(name) is not None
    }
    return _without_padding(TokenRow(input_ids, labels, weights, numbers), row, place)


def _without_padding(tokens: TokenRow, row: Row, place: int) -> TokenRow:
    """Remove the padding that the row's attention mask marks; in a packed row, ignore its labels instead.

    Removing tokens from a packed row would make its `seq_lengths` wrong.
    """
    if row.get("attention_mask") is None:
        return tokens
    name = f"'attention_mask' of row {place}"
    kept = _aligned(row["attention_mask"], np.int64, len(tokens.input_ids), name).astype(bool)
    if kept.all() or not kept.any():
        return tokens
    if row.get("seq_lengths") is not None:
        return replace(tokens, labels=np.where(kept, tokens.labels, IGNORE_INDEX))
    weights = None if tokens.weights is None else tokens.weights[kept]
    numbers = {name: values[kept] for name, values in tokens.numbers.items()}
    return TokenRow(tokens.input_ids[kept], tokens.labels[kept], weights, numbers)


def _array(values: Any, dtype: type) -> Array:
    return np.asarray(values, dtype=dtype).reshape(-1)


def _aligned(values: Any, dtype: type, length: int, what: str) -> Array:
    array = _array(values, dtype)
    if len(array) != length:
        raise ValueError(f"{what} of the batch has {len(array)} values for {length} input_ids; they must be equal")
    return array


def document_lengths(row: Row, num_tokens: int, place: int) -> Array:
    """Return the lengths of a row's documents, `(num_documents,)`; a row without `seq_lengths` is one document.

    Args:
        row: Row of a data set.
        num_tokens: Its length.
        place: Position of the row in the batch, for messages.

    Raises:
        ValueError: `seq_lengths` do not add up to the length of the row, or one is not positive.
    """
    if row.get("seq_lengths") is None:
        return np.array([num_tokens])
    lengths = _array(row["seq_lengths"], np.int64)
    if lengths.sum() != num_tokens or (lengths < 1).any():
        raise ValueError(
            f"'seq_lengths' of row {place} of the batch are {lengths.tolist()} for {num_tokens} input_ids; "
            f"they must be positive and add up to {num_tokens}"
        )
    return lengths


@dataclass(frozen=True)
class FlatRow:
    """Documents one after another, and their `lengths` `(num_documents,)`; first labels of documents are ignored."""

    tokens: TokenRow
    lengths: Array


def join_rows(
    rows: Sequence[TokenRow], lengths: Array, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> FlatRow:
    """Join rows into one flat row.

    Args:
        rows: Rows to join, in order.
        lengths: `(num_documents,)` lengths of the documents of all rows, in order.
        pad_token_id: Token of the document that fills the row up to a multiple.
        pad_to_multiple_of: See `DataCollatorForSFT`.
    """
    fill = -sum(len(row.input_ids) for row in rows) % (pad_to_multiple_of or 1)
    if fill:
        padding = TokenRow(np.full(fill, pad_token_id), np.full(fill, IGNORE_INDEX), None)
        rows, lengths = [*rows, padding], np.append(lengths, fill)
    labels = np.concatenate([row.labels for row in rows])
    labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
    weighted = any(row.weights is not None for row in rows)
    weights = np.concatenate([_weights(row) for row in rows]) if weighted else None
    numbers = {name: np.concatenate([_numbers(row, name) for row in rows]) for name in _numbered(rows)}
    return FlatRow(TokenRow(np.concatenate([row.input_ids for row in rows]), labels, weights, numbers), lengths)


def flat_batch(flat: FlatRow, *, shared: bool = False) -> dict[str, torch.Tensor]:
    """Return the batch of one flat row; see `DataCollatorForSFT` for its keys.

    Args:
        flat: Joined documents.
        shared: Whether to add the columns of `SharedTokens`, if some tokens need not be computed.
    """
    tokens, lengths = flat.tokens, flat.lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    arrays = {
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "position_ids": np.arange(len(tokens.labels)) - np.repeat(starts, lengths),
    }
    if tokens.weights is not None:
        arrays["loss_weights"] = tokens.weights
    arrays |= tokens.numbers
    batch = {name: torch.from_numpy(values)[None] for name, values in arrays.items()}
    batch["seq_lengths"] = torch.from_numpy(lengths)
    plan = share_tokens(tokens.input_ids, tokens.labels, lengths, tokens.weights) if shared else None
    return batch if plan is None else {**batch, **plan.to_batch()}


def _weights(row: TokenRow) -> Array:
    return np.ones(len(row.input_ids), dtype=np.float32) if row.weights is None else row.weights


def _numbered(rows: Sequence[TokenRow]) -> list[str]:
    """Return the columns of `NUMBERS` that some row has."""
    return [name for name in NUMBERS if any(name in row.numbers for row in rows)]


def _numbers(row: TokenRow, name: str) -> Array:
    return row.numbers[name] if name in row.numbers else np.full(len(row.input_ids), -1)


def padded_batch(rows: Sequence[TokenRow], settings: DataCollatorForSFT) -> dict[str, torch.Tensor]:
    """Return a batch of rows padded to the longest; see `DataCollatorForSFT` for its keys."""
    multiple = settings.pad_to_multiple_of or 1
    width = -(-max(len(row.input_ids) for row in rows) // multiple) * multiple
    left = settings.padding_side == "left"
    arrays = {
        "input_ids": _padded([row.input_ids for row in rows], width, settings.pad_token_id, np.int64, left=left),
        "labels": _padded([row.labels for row in rows], width, IGNORE_INDEX, np.int64, left=left),
        "attention_mask": _padded([np.ones_like(row.input_ids) for row in rows], width, 0, np.int64, left=left),
    }
    if left:
        starts = width - np.array([len(row.input_ids) for row in rows])
        arrays["labels"][np.flatnonzero(starts), starts[starts > 0]] = IGNORE_INDEX
    if any(row.weights is not None for row in rows):
        arrays["loss_weights"] = _padded([_weights(row) for row in rows], width, 0, np.float32, left=left)
    for name in _numbered(rows):
        arrays[name] = _padded([_numbers(row, name) for row in rows], width, -1, np.int64, left=left)
    if settings.return_position_ids:
        arrays["position_ids"] = (
            np.maximum(arrays["attention_mask"].cumsum(axis=1) - 1, 0)
            if left
            else np.tile(np.arange(width), (len(rows), 1))
        )
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _padded(values: Sequence[Array], width: int, fill: int, dtype: type, *, left: bool) -> Array:
    output: Array = np.full((len(values), width), fill, dtype=dtype)
    for row, array in zip(output, values, strict=True):
        start = width - len(array) if left else 0
        row[start : start + len(array)] = array
    return output
