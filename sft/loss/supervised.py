"""The supervised loss of a batch: head and cross entropy on supervised positions only, weighted by tokens.

A position is supervised when the token after it, in the same document, has a label. Flat batches and padded ones
give the same sums; dividing by the targets of the whole accumulated batch makes the update independent of how
the batch was cut up.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from sft.inner_model import causal_lm
from sft.loss.cross_entropy import LossOptions, TokenSums, cross_entropy_sums, linear_cross_entropy_sums
from sft.loss.head import plain_head, states_before_head, takes_logits_to_keep
from sft.loss.targets import Batch, Targets, find_targets, model_arguments


@dataclass(frozen=True)
class SupervisedLogits:
    """Logits `(num_targets, vocab)` of a batch's targets, and the model's whole output."""

    logits: torch.Tensor
    targets: Targets
    outputs: Any


def supervised_logits(model: nn.Module, inputs: Batch) -> SupervisedLogits:
    """Run a model and keep the logits of supervised positions, the head running on those alone where the model can.

    Args:
        model: causal language model, wrapped or not.
        inputs: a collator's batch, with `labels`. A flat batch needs `document_layout` around this and its backward.
    """
    targets = find_targets(inputs)
    kept = torch.unique(targets.position)
    if takes_positions(model) and len(kept):
        outputs = model(**model_arguments(inputs), logits_to_keep=kept)
        if outputs.logits.shape[1] == len(kept):
            places = torch.searchsorted(kept, targets.position)
            return SupervisedLogits(_rows_at(outputs.logits, targets, places), targets, outputs)
    else:
        outputs = model(**model_arguments(inputs))
    return SupervisedLogits(_at_targets(outputs.logits, inputs, targets), targets, outputs)


def takes_positions(model: nn.Module) -> bool:
    """Whether the head can be asked for a list of positions.

    unsloth's forward has the argument and its older name `num_logits_to_keep`: earlier versions fail on a list there,
    later ones ignore it and give all logits.
    """
    return takes_logits_to_keep(model) and "num_logits_to_keep" not in signature(causal_lm(model).forward).parameters


def _at_targets(logits: torch.Tensor, inputs: Batch, targets: Targets) -> torch.Tensor:
    """Pick the targets' rows out of all logits, which prompt tuning makes longer than what the model was given."""
    given = len(inputs["computed"]) if "computed" in inputs else inputs["labels"].shape[1]
    return _rows_at(logits, targets, targets.position + logits.shape[1] - given)


def _rows_at(states: torch.Tensor, targets: Targets, place: torch.Tensor) -> torch.Tensor:
    """Pick `(num_targets, width)` out of `(batch, length, width)`, without a copy when that is a whole flat batch."""
    if states.shape[0] == 1 and len(place) == states.shape[1] and targets.in_order:
        return states[0]
    return states[targets.row, place]


@dataclass(frozen=True)
class SupervisedLoss:
    """A batch's loss and figures, tensors without dimensions but for `logits`.

    Attributes:
        loss: summed losses divided by `num_items`, with gradient; this is what to minimise.
        loss_sum: summed losses, without gradient.
        weight: sum of the targets' weights, their number where there are none.
        num_targets: targets.
        num_correct: targets with the largest logit.
        entropy: summed entropies of the predictions; None unless asked for.
        router_loss: what load balancing of a mixture of experts adds to each target's loss; None where it has no part.
        logits: all logits `(batch, length, vocab)` when they were asked for.
    """

    loss: torch.Tensor
    loss_sum: torch.Tensor
    weight: torch.Tensor
    num_targets: torch.Tensor
    num_correct: torch.Tensor
    entropy: torch.Tensor | None
    router_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def supervised_loss(
    model: nn.Module,
    inputs: Batch,
    num_items: torch.Tensor | int | None = None,
    options: LossOptions | None = None,
    keep_logits: bool = False,
) -> SupervisedLoss:
    """Run a model on a batch and score it by the fastest way that is exact for this model.

    Args:
        model: causal language model, wrapped or not.
        inputs: a collator's batch, with `labels`. A flat batch needs `document_layout` around this and its backward.
        num_items: what the summed losses are divided by: `num_targets` of all batches of the update, over all
            processes. This batch's own when None.
        options: what is minimised.
        keep_logits: return all logits too, which costs a full run of the head.
    """
    options = options or LossOptions()
    logits = None
    head = None if keep_logits else plain_head(model)
    if head is not None:
        targets = find_targets(inputs)
        hidden, outputs = states_before_head(model, inputs)
        states = _rows_at(hidden, targets, targets.position)
        sums = linear_cross_entropy_sums(states, head, targets.token, targets.weight, options)
    elif keep_logits:
        targets, outputs = find_targets(inputs), model(**model_arguments(inputs))
        logits = outputs.logits
        picked = _at_targets(logits, inputs, targets)
        sums = cross_entropy_sums(picked, targets.token, targets.weight, options)
    else:
        supervised = supervised_logits(model, inputs)
        targets, outputs = supervised.targets, supervised.outputs
        sums = cross_entropy_sums(supervised.logits, targets.token, targets.weight, options)
    figures = _Figures(sums, targets.weight, options)
    return figures.result(num_items, _router_loss(model, outputs), logits)


def sft_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    options: LossOptions | None = None,
    weights: torch.Tensor | None = None,
) -> SupervisedLoss:
    """Loss of supervised tokens whose logits are at hand.

    Args:
        logits: `(num_targets, vocab)`.
        targets: `(num_targets,)` int64.
        num_items: what the summed losses are divided by; the sum of the weights when None.
        options: what is minimised.
        weights: `(num_targets,)` factor of each loss; 1 when None.
    """
    options = options or LossOptions()
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.float()
    sums = cross_entropy_sums(logits, targets, weights, options)
    return _Figures(sums, weights, options).result(num_items)


@dataclass(frozen=True)
class _Figures:
    """Sums of a batch on their way to a `SupervisedLoss`."""

    sums: TokenSums
    weights: torch.Tensor
    options: LossOptions

    def result(
        self,
        num_items: torch.Tensor | int | None,
        router_loss: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> SupervisedLoss:
        weight = self.weights.sum()
        divisor = weight if num_items is None else torch.as_tensor(num_items, device=weight.device).to(weight.dtype)
        divisor = divisor.clamp_min(torch.finfo(weight.dtype).tiny)
        loss = self.sums.loss / divisor
        if router_loss is not None:
            loss = loss + router_loss * (weight / divisor)
        return SupervisedLoss(
            loss=loss,
            loss_sum=self.sums.loss.detach(),
            weight=weight,
            num_targets=torch.tensor(len(self.weights), device=weight.device),
            num_correct=self.sums.num_correct,
            entropy=self.sums.entropy if self.options.entropy else None,
            router_loss=None if router_loss is None else router_loss.detach(),
            logits=logits,
        )


def _router_loss(model: nn.Module, outputs: Any) -> torch.Tensor | None:
    """Load balancing loss of a mixture of experts, where its configuration asks for it."""
    router_loss = getattr(outputs, "aux_loss", None)
    if router_loss is None:
        return None
    return router_loss * causal_lm(model).config.get_text_config().router_aux_loss_coef
