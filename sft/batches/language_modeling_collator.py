"""Collator of tokenized rows with the options and the keys of the collator that scripts of the SFT document import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sft.batches.collator import (
    Array,
    DataCollatorForSFT,
    Row,
    TokenRow,
    document_lengths,
    flat_batch,
    join_rows,
    padded_batch,
    read_row,
)
from sft.labels import TOKEN_MASKS

TRUNCATION_MODES = ("keep_start", "keep_end")
PER_TOKEN = ("input_ids", "labels", *TOKEN_MASKS, "attention_mask", "loss_weights", "position_ids")
"""Columns of a row that have one value per token."""


class _Document(NamedTuple):
    """A row as arrays, and the lengths of its documents `(num_documents,)`."""

    tokens: TokenRow
    lengths: Array


@dataclass
class DataCollatorForLanguageModeling:
    """Collate tokenized rows; `labels` are used as they are, else made of `input_ids` and the row's masks.

    A padded batch has `input_ids`, `labels` and `attention_mask`, each `(batch, longest)`, and with
    `return_position_ids` also `position_ids`. A flat batch (`padding_free`) has `input_ids`, `labels` and
    `position_ids`, each `(1, total)`. It also has what kernels for documents of many lengths read: `cu_seq_lens_q`,
    `cu_seq_lens_k`, `max_length_q`, `max_length_k` and `seq_idx`.

    A row may have several documents. They are described by `seq_lengths`, or by `position_ids` that restart at 0. A
    padded batch on its own does not keep them apart. In `SFTTrainer`, such rows are always made a flat batch, and
    flat batches have `seq_lengths` instead of the keys for kernels.

    Attributes:
        pad_token_id: Padding of `input_ids`; never trained and never attended to.
        completion_only_loss: Whether `completion_mask` is applied to rows without labels.
        padding_free: Whether to join the rows instead of padding them.
        return_position_ids: Whether padded batches have `position_ids`.
        pad_to_multiple_of: Pad to a multiple of this many tokens.
        max_length: Truncate rows to this many tokens; None = keep all.
        truncation_mode: Which end of a long row is kept: `keep_start` or `keep_end`.
        return_tensors: `pt`.
        for_trainer: Whether batches are those that `SFTTrainer` needs; the trainer sets it.
    """

    pad_token_id: int
    completion_only_loss: bool = True
    padding_free: bool = False
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    return_tensors: str = "pt"
    for_trainer: bool = False

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode={self.truncation_mode!r}: use one of {', '.join(TRUNCATION_MODES)}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a sequence needs at least 2 tokens to predict one")

    def __call__(self, features: Sequence[Row], return_tensors: str | None = None) -> dict[str, Any]:
        """Collate rows with `input_ids`; see the class for the keys of the batch.

        Raises:
            ValueError: A row is malformed; the message names its position in the batch.
        """
        asked = return_tensors or self.return_tensors
        if asked != "pt":
            raise ValueError(f"return_tensors={asked!r} is not supported; batches are PyTorch tensors ('pt')")
        return self.torch_call(list(features))

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Collate rows to tensors."""
        documents = [self._read(row, place) for place, row in enumerate(examples)]
        lengths = np.concatenate([document.lengths for document in documents])
        joined = self.padding_free or (self.for_trainer and len(lengths) > len(documents))
        rows = [document.tokens for document in documents]
        if joined:
            batch: dict[str, Any] = flat_batch(join_rows(rows, lengths, self.pad_token_id, self.pad_to_multiple_of))
            return batch if self.for_trainer else _with_kernel_keys(batch, int(lengths.sum()))
        settings = DataCollatorForSFT(self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        batch = dict(padded_batch(rows, settings))
        if self.return_position_ids:
            positions = self.get_position_ids_from_packed_seq_lengths([row.lengths.tolist() for row in documents])
            batch["position_ids"] = torch.zeros_like(batch["input_ids"])
            for row, values in zip(batch["position_ids"], positions, strict=True):
                row[: len(values)] = values
        return batch

    @staticmethod
    def get_position_ids_from_packed_seq_lengths(batch_seq_lengths: list[list[int]]) -> list[torch.Tensor]:
        """Return the position ids of each row, int64 `(length,)`, which restart at 0 with each document.

        Args:
            batch_seq_lengths: The lengths of the documents of each row.
        """
        return [torch.cat([torch.arange(length) for length in lengths]) for lengths in batch_seq_lengths]

    def _read(self, row: Any, place: int) -> _Document:
        columns = _columns(row)
        if columns.get("labels") is not None:
            columns = {name: value for name, value in columns.items() if name not in TOKEN_MASKS}
        elif not self.completion_only_loss:
            columns.pop("completion_mask", None)
        columns, lengths = self._truncated(columns, place)
        tokens = read_row({**columns, "seq_lengths": lengths}, place)
        return _Document(tokens, document_lengths({"seq_lengths": lengths}, len(tokens.input_ids), place))

    def _truncated(self, columns: dict[str, Any], place: int) -> tuple[dict[str, Any], list[int] | None]:
        """Return the columns of a row without the tokens above `max_length`, and the lengths of its documents."""
        lengths = _lengths(columns, place)
        num_tokens = len(columns.get("input_ids", ()))
        if self.max_length is None or num_tokens <= self.max_length:
            return columns, lengths
        from_end = self.truncation_mode == "keep_end"
        kept = slice(num_tokens - self.max_length, None) if from_end else slice(self.max_length)
        columns = {name: value[kept] if name in PER_TOKEN else value for name, value in columns.items()}
        if lengths is None:
            return columns, None
        # which document each token belongs to, cut as the tokens are
        owners = np.repeat(np.arange(len(lengths)), lengths)[kept]
        return columns, np.unique(owners, return_counts=True)[1].tolist()


def _columns(row: Any) -> dict[str, Any]:
    """Return the columns of a row that are not null; a bare list of token ids is a row, too."""
    given = row if hasattr(row, "keys") else {"input_ids": row}
    return {name: given[name] for name in given if given[name] is not None}


def _lengths(columns: dict[str, Any], place: int) -> list[int] | None:
    """Return the lengths of a row's documents, which `seq_lengths` or `position_ids` state; None for one document.

    Raises:
        ValueError: The position ids of a document do not count from 0.
    """
    if "seq_lengths" in columns:
        return [int(length) for length in columns["seq_lengths"]]
    if "position_ids" not in columns:
        return None
    positions = np.asarray(columns["position_ids"], dtype=np.int64).reshape(-1)
    starts = np.flatnonzero(positions == 0)
    lengths = np.diff(np.append(starts, len(positions)))
    counted = np.arange(len(positions)) - np.repeat(starts, lengths) if len(starts) and starts[0] == 0 else None
    if counted is None or (positions != counted).any():
        raise ValueError(
            f"'position_ids' of row {place} of the batch are {positions[:12].tolist()}...; in each document they must "
            "count 0, 1, 2, ..., since documents are told apart by where they restart"
        )
    return lengths.tolist()


def _with_kernel_keys(batch: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return a flat batch with the keys that kernels read, instead of `seq_lengths`.

    Args:
        batch: Result of `flat_batch`.
        num_tokens: Number of tokens without those that pad to a multiple, whose positions are 0.
    """
    lengths = batch.pop("seq_lengths")
    batch["position_ids"][:, num_tokens:] = 0
    fill = batch["input_ids"].shape[1] - num_tokens
    if fill:  # each token that pads is a document of its own, as its position says
        lengths = torch.cat([lengths[:-1], torch.ones(fill, dtype=lengths.dtype)])
    boundaries = torch.cat([torch.zeros(1, dtype=lengths.dtype), lengths.cumsum(0)]).to(torch.int32)
    longest = int(lengths.max())
    owners = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    return {
        **batch,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": owners[None],
    }
