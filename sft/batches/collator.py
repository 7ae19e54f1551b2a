"""Rows in, one batch of tensors out: padded to the longest, or joined into one flat row without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft.batches.shared_tokens import share_tokens
from sft.labels import IGNORE_INDEX, TOKEN_MASKS

Array = np.ndarray[Any, Any]
Row = Mapping[str, Any]


@dataclass
class DataCollatorForSFT:
    """Make a batch of tokenized rows.

    Padded (`padding_free=False`, and no row has `seq_lengths`): `input_ids`, `labels`, `attention_mask`, each
    `(batch, longest)`, padded on the right, labels on padding ignored.

    Flat (`padding_free=True`, or packed rows): ONE row of all documents. `input_ids`, `labels`, `position_ids`, each
    `(1, total)`; positions restart at 0 with each document; `seq_lengths` `(num_documents,)`; no attention mask, as the
    lengths say it all. Each document's first label is ignored: after the shift by one it would be predicted
    from its neighbour's last token.

    `loss_weights` (float32, shaped like the labels) are in the batch when a row has them.

    Attributes:
        pad_token_id: fills `input_ids` up; never trained and never attended to.
        padding_free: join the rows instead of padding them.
        pad_to_multiple_of: fill up to a multiple of this many tokens; in a flat row by one more, untrained document.
        return_position_ids: give `position_ids` with padded batches too (flat ones always have them).
        share_tokens: with flat batches, also say which tokens need not be computed, in the columns of
            `sft.batches.shared_tokens.SharedTokens`; not where rows are filled up to a multiple.
    """

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    return_position_ids: bool = False
    share_tokens: bool = False

    def __call__(self, features: Sequence[Row], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Collate rows with `input_ids` and perhaps `labels`, `seq_lengths`, `loss_weights`, token masks."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; batches are PyTorch tensors ('pt')")
        rows = [read_row(row, place) for place, row in enumerate(features)]
        if self.padding_free or any("seq_lengths" in row for row in features):
            lengths = [document_lengths(row, len(rows[place].input_ids), place) for place, row in enumerate(features)]
            flat = join_rows(rows, np.concatenate(lengths), self.pad_token_id, self.pad_to_multiple_of)
            return flat_batch(flat, shared=self.share_tokens and self.pad_to_multiple_of is None)
        return padded_batch(rows, self)


@dataclass(frozen=True)
class TokenRow:
    """One row as arrays of equal length; `weights` is None where every token weighs 1."""

    input_ids: Array
    labels: Array
    weights: Array | None


def read_row(row: Row, place: int) -> TokenRow:
    """Turn one row of a data set into arrays, its token masks applied to its labels.

    Raises:
        ValueError: the row is empty, or a column differs in length from `input_ids`; tells its place in the batch.
    """
    if "input_ids" not in row:
        raise ValueError(f"row {place} of the batch has no 'input_ids', only {sorted(row)}; is the data set tokenized?")
    input_ids = _array(row["input_ids"], np.int64)
    if not len(input_ids):
        raise ValueError(f"row {place} of the batch has no tokens; filter empty rows out first")
    labels = input_ids
    for name in ("labels", *TOKEN_MASKS):
        if row.get(name) is None:
            continue
        values = _aligned(row[name], np.int64, len(input_ids), f"{name!r} of row {place}")
        labels = values if name == "labels" else np.where(values.astype(bool), labels, IGNORE_INDEX)
    weights = row.get("loss_weights")
    if weights is not None:
        weights = _aligned(weights, np.float32, len(input_ids), f"'loss_weights' of row {place}")
    return _without_padding(TokenRow(input_ids, labels, weights), row, place)


def _without_padding(tokens: TokenRow, row: Row, place: int) -> TokenRow:
    """Take out what the row's own attention mask says is padding; in a packed row, which has borders, untrain it."""
    if row.get("attention_mask") is None:
        return tokens
    name = f"'attention_mask' of row {place}"
    kept = _aligned(row["attention_mask"], np.int64, len(tokens.input_ids), name).astype(bool)
    if kept.all() or not kept.any():
        return tokens
    if row.get("seq_lengths") is not None:
        return TokenRow(tokens.input_ids, np.where(kept, tokens.labels, IGNORE_INDEX), tokens.weights)
    weights = None if tokens.weights is None else tokens.weights[kept]
    return TokenRow(tokens.input_ids[kept], tokens.labels[kept], weights)


def _array(values: Any, dtype: type) -> Array:
    return np.asarray(values, dtype=dtype).reshape(-1)


def _aligned(values: Any, dtype: type, length: int, what: str) -> Array:
    array = _array(values, dtype)
    if len(array) != length:
        raise ValueError(f"{what} of the batch has {len(array)} values for {length} input_ids; they must be equal")
    return array


def document_lengths(row: Row, num_tokens: int, place: int) -> Array:
    """Lengths of a row's documents, `(num_documents,)`: its `seq_lengths`, or itself as one document of `num_tokens`.

    Raises:
        ValueError: `seq_lengths` do not add up to the row; names the row's place in the batch.
    """
    if row.get("seq_lengths") is None:
        return np.array([num_tokens])
    lengths = _array(row["seq_lengths"], np.int64)
    if lengths.sum() != num_tokens or (lengths < 1).any():
        raise ValueError(
            f"'seq_lengths' of row {place} of the batch are {lengths.tolist()} for {num_tokens} input_ids; "
            "they must be positive and add up to it"
        )
    return lengths


@dataclass(frozen=True)
class FlatRow:
    """Documents one after another, `lengths` `(num_documents,)` their lengths; no document's first label counts."""

    tokens: TokenRow
    lengths: Array


def join_rows(
    rows: Sequence[TokenRow], lengths: Array, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> FlatRow:
    """Join rows into one.

    Args:
        rows: the tokens.
        lengths: `(num_documents,)` document lengths through all rows, in order.
        pad_token_id: fills up to the multiple.
        pad_to_multiple_of: see `DataCollatorForSFT`.
    """
    fill = -sum(len(row.input_ids) for row in rows) % (pad_to_multiple_of or 1)
    if fill:
        padding = TokenRow(np.full(fill, pad_token_id), np.full(fill, IGNORE_INDEX), None)
        rows, lengths = [*rows, padding], np.append(lengths, fill)
    labels = np.concatenate([row.labels for row in rows])
    labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
    weighted = any(row.weights is not None for row in rows)
    weights = np.concatenate([_weights(row) for row in rows]) if weighted else None
    return FlatRow(TokenRow(np.concatenate([row.input_ids for row in rows]), labels, weights), lengths)


def flat_batch(flat: FlatRow, *, shared: bool = False) -> dict[str, torch.Tensor]:
    """The batch of one flat row; see `DataCollatorForSFT` for what comes out."""
    tokens, lengths = flat.tokens, flat.lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    arrays = {
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "position_ids": np.arange(len(tokens.labels)) - np.repeat(starts, lengths),
    }
    if tokens.weights is not None:
        arrays["loss_weights"] = tokens.weights
    batch = {name: torch.from_numpy(values)[None] for name, values in arrays.items()}
    batch["seq_lengths"] = torch.from_numpy(lengths)
    plan = share_tokens(tokens.input_ids, tokens.labels, lengths, tokens.weights) if shared else None
    return batch if plan is None else {**batch, **plan.to_batch()}


def _weights(row: TokenRow) -> Array:
    return np.ones(len(row.input_ids), dtype=np.float32) if row.weights is None else row.weights


def padded_batch(rows: Sequence[TokenRow], settings: DataCollatorForSFT) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest; see `DataCollatorForSFT` for what comes out."""
    multiple = settings.pad_to_multiple_of or 1
    width = -(-max(len(row.input_ids) for row in rows) // multiple) * multiple
    arrays = {
        "input_ids": _padded([row.input_ids for row in rows], width, settings.pad_token_id, np.int64),
        "labels": _padded([row.labels for row in rows], width, IGNORE_INDEX, np.int64),
        "attention_mask": _padded([np.ones_like(row.input_ids) for row in rows], width, 0, np.int64),
    }
    if any(row.weights is not None for row in rows):
        arrays["loss_weights"] = _padded([_weights(row) for row in rows], width, 0, np.float32)
    if settings.return_position_ids:
        arrays["position_ids"] = np.tile(np.arange(width), (len(rows), 1))
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _padded(values: Sequence[Array], width: int, fill: int, dtype: type) -> Array:
    output: Array = np.full((len(values), width), fill, dtype=dtype)
    for row, array in zip(output, values, strict=True):
        row[: len(array)] = array
    return output
