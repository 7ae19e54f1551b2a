"""Targets of a batch: the tokens that are trained, and the positions that they are predicted from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sft.batches.layout import FILLER, SKIP_LOGITS
from sft.batches.shared_tokens import SHARED_KEYS
from sft.inner_model import takes_position_ids
from sft.labels import IGNORE_INDEX, LOSS_GROUPS, TEACHER_ROWS, TOKEN_MASKS

Batch = Mapping[str, Any]

NOT_FOR_THE_MODEL = (
    "labels",
    "shift_labels",
    "seq_lengths",
    "loss_weights",
    TEACHER_ROWS,
    LOSS_GROUPS,
    *TOKEN_MASKS,
    "num_items_in_batch",
    *SHARED_KEYS,
    FILLER,
    SKIP_LOGITS,
)
"""Keys of a batch that are not arguments of the model's forward."""


@dataclass(frozen=True)
class Targets:
    """Tokens that a batch trains.

    Attributes:
        row: `(num_targets,)` row of each target in the batch.
        position: `(num_targets,)` position that the target is predicted from, among the tokens that the model computes.
        token: `(num_targets,)` token id to predict.
        weight: `(num_targets,)` float32, above 0.
        in_order: Whether positions ascend and no two targets share one.
        recorded: `(num_targets,)` number of each target's recorded distribution (see `Teacher`), -1 = none; None if the
            batch has no `teacher_rows`.
        group: `(num_targets,)` number of the group that each target's loss is reported in, -1 = none; None if the
            batch has no `loss_groups`.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    in_order: bool = True
    recorded: torch.Tensor | None = None
    group: torch.Tensor | None = None

    def __getitem__(self, chosen: torch.Tensor) -> Targets:
        """Return some of the targets, by their numbers `(num_chosen,)`."""
        recorded, group = (None if values is None else values[chosen] for values in (self.recorded, self.group))
        return Targets(
            self.row[chosen], self.position[chosen], self.token[chosen], self.weight[chosen], False, recorded, group
        )

    def __len__(self) -> int:
        return self.token.shape[0]


def find_targets(batch: Batch) -> Targets:
    """List the targets of a batch, row by row.

    1. Position `p` is supervised if the label of `p + 1` is not ignored. A collator may state the labels of the next
       positions itself, as `shift_labels`, in which the last position may have a label, too.
    2. The last position of each document of a flat batch is not: the next token belongs to the next document.
    3. Neither are positions whose target weighs 0.
    4. If the batch has a `SharedTokens` plan, map positions in the row to places among the computed tokens. Several
       targets may then be predicted from one place.

    Args:
        batch: With `labels` `(batch, length)`, and optionally `shift_labels` `(batch, length)`, `seq_lengths`
            `(num_documents,)`, `loss_weights`, `teacher_rows` and `loss_groups` `(batch, length)`, and `places`
            `(length,)`.
    """
    following = batch.get("shift_labels")
    if following is None:
        following = _from_next(batch["labels"], IGNORE_INDEX)
    supervised = following != IGNORE_INDEX
    lengths, weights = batch.get("seq_lengths"), batch.get("loss_weights")
    if lengths is not None:
        ends = lengths.cumsum(0)[:-1]
        supervised[:, ends - 1] = False
    if weights is not None:
        weights = _from_next(weights, 1)
        supervised &= weights > 0
    row, position = supervised.nonzero(as_tuple=True)
    token = following[row, position]
    weight = torch.ones_like(token, dtype=torch.float32) if weights is None else weights[row, position].float()
    recorded, group = (
        None if batch.get(name) is None else _from_next(batch[name], -1)[row, position]
        for name in (TEACHER_ROWS, LOSS_GROUPS)
    )
    if "places" not in batch:
        return Targets(row, position, token, weight, recorded=recorded, group=group)
    return Targets(row, batch["places"][position], token, weight, in_order=False, recorded=recorded, group=group)


def _from_next(values: torch.Tensor, last: float) -> torch.Tensor:
    """Return the value of the next position at each position of a row; the last one gets `last`."""
    return nn.functional.pad(values[:, 1:], (0, 1), value=last)


def num_targets(batch: Batch) -> torch.Tensor:
    """Return what a batch adds to the loss's divisor, a scalar: its number of targets, or the sum of their weights."""
    return find_targets(batch).weight.sum()


def model_arguments(model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Return the arguments of a model's forward: the batch without what only the loss reads, and `use_cache=False`.

    `position_ids` are left out for a model that does not take them.

    If the batch has a `SharedTokens` plan, only the tokens to compute are passed on.
    """
    arguments = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
    if "computed" in inputs:
        for name in ("input_ids", "position_ids"):
            arguments[name] = arguments[name][:, inputs["computed"]]
    if not takes_position_ids(model):
        arguments.pop("position_ids", None)
    return {**arguments, "use_cache": False}
