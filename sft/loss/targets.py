"""Which tokens of a batch are trained, and from which positions they are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sft.batches.shared_tokens import SHARED_KEYS
from sft.labels import IGNORE_INDEX, TOKEN_MASKS

Batch = Mapping[str, Any]

NOT_FOR_THE_MODEL = (
    "labels",
    "seq_lengths",
    "loss_weights",
    *TOKEN_MASKS,
    "num_items_in_batch",
    *SHARED_KEYS,
    "filler",
)


@dataclass(frozen=True)
class Targets:
    """What a batch trains.

    Attributes:
        row: `(num_targets,)` row of the batch.
        position: `(num_targets,)` position in what the model computes that the target is predicted from.
        token: `(num_targets,)` id to predict.
        weight: `(num_targets,)` float32, above 0.
        in_order: whether positions ascend, each with one target.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    in_order: bool = True

    def __len__(self) -> int:
        return self.token.shape[0]


def find_targets(batch: Batch) -> Targets:
    """List the targets of a batch with `labels` `(batch, length)` and perhaps `seq_lengths` and `loss_weights`.

    Where the batch has `SharedTokens`, several targets may be predicted from one position.
    """
    labels = batch["labels"]
    supervised = labels[:, 1:] != IGNORE_INDEX
    lengths, weights = batch.get("seq_lengths"), batch.get("loss_weights")
    if lengths is not None:
        ends = lengths.cumsum(0)[:-1]
        supervised[:, ends - 1] = False
    if weights is not None:
        supervised &= weights[:, 1:] > 0
    row, position = supervised.nonzero(as_tuple=True)
    token = labels[row, position + 1]
    weight = torch.ones_like(token, dtype=torch.float32) if weights is None else weights[row, position + 1].float()
    if "places" not in batch:
        return Targets(row, position, token, weight)
    return Targets(row, batch["places"][position], token, weight, in_order=False)


def num_targets(batch: Batch) -> torch.Tensor:
    """What a batch counts in the loss's denominator: its targets, or the sum of their weights; without dimensions."""
    return find_targets(batch).weight.sum()


def model_arguments(inputs: Batch) -> dict[str, Any]:
    """The batch without what only the loss reads; no cache is asked for."""
    arguments = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
    if "computed" in inputs:
        for name in ("input_ids", "position_ids"):
            arguments[name] = arguments[name][:, inputs["computed"]]
    return {**arguments, "use_cache": False}
