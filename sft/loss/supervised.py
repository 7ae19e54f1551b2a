"""Loss of a batch: language model head and cross entropy on the supervised positions only.

A position is supervised if the next token of the same document has a label. Flat and padded batches give the same
sums. `SFTTrainer` divides them by the number of targets of all accumulated batches, so that an update does not depend
on how its rows were divided into batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import nn

from sft.inner_model import causal_lm
from sft.labels import IGNORE_INDEX
from sft.loss.cross_entropy import Head, LossOptions, TokenSums, cross_entropy_sums, linear_cross_entropy_sums
from sft.loss.head import plain_head, states_before_head, takes_logits_to_keep
from sft.loss.targets import Batch, Targets, find_targets, model_arguments
from sft.loss.teacher import SoftTargets, Teacher

ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names that configurations have for the weight of the load-balancing loss."""


@dataclass(frozen=True)
class SupervisedLoss:
    """Loss and figures of a batch; all but `logits` are scalar tensors.

    Attributes:
        loss: Sum of the losses divided by `num_items`, with a gradient; this is what to minimize.
        loss_sum: Sum of the losses, without a gradient.
        weight: Sum of the targets' weights; equals their number if the batch has no `loss_weights`.
        num_targets: Number of targets.
        num_correct: Number of targets that have the largest logit.
        entropy: Sum of the predictions' entropies in nats; None unless `LossOptions.entropy` is set.
        router_loss: Load-balancing loss of a mixture of experts, with its weight, for the batch alone; None if there is
            none. `loss` contains the share of it that this batch's targets are of `num_items`.
        logits: All logits `(batch, length, vocab)`; None unless `keep_logits` is set.
        groups: `(num_groups, 2)` sums of the losses and of the weights of each group; None unless asked for.
    """

    loss: torch.Tensor
    loss_sum: torch.Tensor
    weight: torch.Tensor
    num_targets: torch.Tensor
    num_correct: torch.Tensor
    entropy: torch.Tensor | None
    router_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    groups: torch.Tensor | None = None


@dataclass(frozen=True)
class SupervisedLogits:
    """Logits `(num_targets, vocab)` of a batch's targets, and the output object of the model."""

    logits: torch.Tensor
    targets: Targets
    outputs: Any


def supervised_loss(
    model: nn.Module,
    inputs: Batch,
    num_items: torch.Tensor | int | None = None,
    options: LossOptions | None = None,
    keep_logits: bool = False,
    teacher: Teacher | None = None,
    num_groups: int = 0,
) -> SupervisedLoss:
    """Run a model on a batch and compute its loss in the fastest way that is exact for this model.

    1. If the head is a plain linear map, run the model without it and compute head and cross entropy together.
    2. If all logits are asked for, run the complete model and pick the logits of the targets.
    3. Otherwise let the model compute logits at the supervised positions, see `supervised_logits`.

    Args:
        model: Causal language model, wrapped or not.
        inputs: A collator's batch with `labels` `(batch, length)`. For a flat batch, this call and its backward pass
            must be inside `document_layout`.
        num_items: Divisor of the summed losses: the sum of `num_targets` over all batches and processes of the update.
            If None, the sum of this batch's own weights.
        options: What is minimized.
        keep_logits: Whether to return all logits as well, which costs a full run of the head.
        teacher: Recorded distributions that the batch's `teacher_rows` refer to.
        num_groups: Number of groups that the batch's `loss_groups` refer to, if their losses are wanted.
    """
    options = options or LossOptions()
    logits = None
    head = None if keep_logits else plain_head(model)
    if head is not None:
        targets = find_targets(inputs)
        hidden, outputs = states_before_head(model, inputs)
        states = _pick_targets(hidden, targets, targets.position)
        score = partial(_score_states, head, options, teacher)
    elif keep_logits:
        targets, outputs = find_targets(inputs), model(**model_arguments(model, inputs))
        logits = outputs.logits
        states = _pick_target_logits(logits, inputs, targets)
        score = partial(_score_logits, options, teacher)
    else:
        supervised = supervised_logits(model, inputs)
        states, targets, outputs = supervised.logits, supervised.targets, supervised.outputs
        score = partial(_score_logits, options, teacher)
    groups = None
    if num_groups and targets.group is not None:
        sums, groups = _score_groups(score, states, targets, num_groups)
    else:
        sums = score(states, targets)
    router_loss = _router_loss(model, outputs)
    weight = targets.weight.sum()
    divisor = weight if num_items is None else torch.as_tensor(num_items, device=weight.device).to(weight.dtype)
    divisor = divisor.clamp_min(torch.finfo(weight.dtype).tiny)
    loss = sums.loss / divisor
    if router_loss is not None:
        loss = loss + router_loss * (weight / divisor)
    return SupervisedLoss(
        loss=loss,
        loss_sum=sums.loss.detach(),
        weight=weight,
        num_targets=torch.tensor(len(targets), device=weight.device),
        num_correct=sums.num_correct,
        entropy=sums.entropy if options.entropy else None,
        router_loss=None if router_loss is None else router_loss.detach(),
        logits=logits,
        groups=groups,
    )


Score: TypeAlias = Callable[[torch.Tensor, Targets], TokenSums]
"""Function of the states or logits of targets `(num_targets, width)`, and the targets."""


def _score_states(
    head: Head, options: LossOptions, teacher: Teacher | None, states: torch.Tensor, targets: Targets
) -> TokenSums:
    soft = _soft(targets, teacher)
    return linear_cross_entropy_sums(states, head, targets.token, targets.weight, options, soft)


def _score_logits(options: LossOptions, teacher: Teacher | None, logits: torch.Tensor, targets: Targets) -> TokenSums:
    return cross_entropy_sums(logits, targets.token, targets.weight, options, _soft(targets, teacher))


def _score_groups(
    score: Score, states: torch.Tensor, targets: Targets, num_groups: int
) -> tuple[TokenSums, torch.Tensor]:
    """Score the targets of each group by themselves, each target once; return all sums, and those of the groups."""
    parts: list[TokenSums] = []
    groups = targets.weight.new_zeros(num_groups, 2)
    for number in range(-1, num_groups):
        chosen = torch.nonzero(targets.group == number).squeeze(-1)
        if not len(chosen):
            continue
        of_group = targets[chosen]
        parts.append(score(states[chosen], of_group))
        if number >= 0:
            groups[number, 0], groups[number, 1] = parts[-1].loss.detach(), of_group.weight.sum()
    if not parts:
        parts = [score(states, targets)]
    loss, num_correct, entropy = (
        sum((getattr(part, name) for part in parts[1:]), getattr(parts[0], name))
        for name in ("loss", "num_correct", "entropy")
    )
    return TokenSums(loss, num_correct, entropy), groups


def _soft(targets: Targets, teacher: Teacher | None) -> SoftTargets | None:
    """Return the recorded distributions of a batch's targets; None if there are none."""
    return None if teacher is None or targets.recorded is None else teacher.targets(targets.recorded)


def supervised_logits(model: nn.Module, inputs: Batch) -> SupervisedLogits:
    """Run a model and return the logits of the targets; the head runs on their positions only if the model allows it.

    Args:
        model: Causal language model, wrapped or not.
        inputs: A collator's batch with `labels` `(batch, length)`. For a flat batch, this call and its backward pass
            must be inside `document_layout`.
    """
    targets = find_targets(inputs)
    kept = torch.unique(targets.position)
    if takes_positions(model) and len(kept):
        outputs = model(**model_arguments(model, inputs), logits_to_keep=kept)
        if outputs.logits.shape[1] == len(kept):
            places = torch.searchsorted(kept, targets.position)
            return SupervisedLogits(_pick_targets(outputs.logits, targets, places), targets, outputs)
    else:
        outputs = model(**model_arguments(model, inputs))
    return SupervisedLogits(_pick_target_logits(outputs.logits, inputs, targets), targets, outputs)


def takes_positions(model: nn.Module) -> bool:
    """Return whether the model's `logits_to_keep` accepts a tensor of positions.

    unsloth's forward has both `logits_to_keep` and the older name `num_logits_to_keep`. Its earlier versions fail on a
    tensor there, later ones ignore it and return all logits.
    """
    return takes_logits_to_keep(model) and "num_logits_to_keep" not in signature(causal_lm(model).forward).parameters


def _pick_target_logits(logits: torch.Tensor, inputs: Batch, targets: Targets) -> torch.Tensor:
    """Pick the targets' rows `(num_targets, vocab)` out of all logits `(batch, length, vocab)`.

    Prompt tuning puts virtual tokens first, so that there are more logits than input tokens.
    """
    given = len(inputs["computed"]) if "computed" in inputs else inputs["labels"].shape[1]
    return _pick_targets(logits, targets, targets.position + logits.shape[1] - given)


def _pick_targets(states: torch.Tensor, targets: Targets, place: torch.Tensor) -> torch.Tensor:
    """Pick `(num_targets, width)` out of `(batch, length, width)`, each target's state at its `place` in its row.

    If these are all states of a flat batch in order, return a view instead of a copy.
    """
    if states.shape[0] == 1 and len(place) == states.shape[1] and targets.in_order:
        return states[0]
    return states[targets.row, place]


def _router_loss(model: nn.Module, outputs: Any) -> torch.Tensor | None:
    """Return the weighted load-balancing loss of a mixture of experts; None if its configuration does not ask for it.

    It is a function of all tokens of the batch, trained or not, but not of padding:
    `num_experts * sum_e(share of the choices that are e * mean probability of e)`, over all layers together (Switch
    Transformer, arXiv:2101.03961, as transformers computes it). It is not a sum over tokens. That of an update is the
    mean over its batches, each weighted by its targets.
    """
    router_loss = getattr(outputs, "aux_loss", None)
    if not isinstance(router_loss, torch.Tensor):
        return None
    return router_loss * router_loss_weight(causal_lm(model).config)


def router_loss_weight(config: Any) -> float:
    """Return the weight of the load-balancing loss that a model's configuration states; 0 if it states none."""
    text_config = config.get_text_config()
    return next((weight for name in ROUTER_WEIGHTS if (weight := getattr(text_config, name, None))), 0.0)


def dft_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Return the loss of Dynamic Fine-Tuning (arXiv:2508.05629) of logits, to be given as `compute_loss_func`.

    `SFTConfig(loss_type="dft")` minimizes the same and does not need the logits of all tokens.

    Args:
        outputs: Output of a model with `logits` `(batch, length, vocab)`.
        labels: `(batch, length)`, not shifted. Of a flat batch, first labels of documents are ignored already.
        num_items_in_batch: Divisor of the summed losses; None = the number of this batch's own targets.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    tokens = targets[trained]
    logits = outputs.logits[:, :-1][trained.to(outputs.logits.device)]
    tokens = tokens.to(logits.device)
    weights = torch.ones(len(tokens), device=logits.device)
    loss = cross_entropy_sums(logits, tokens, weights, LossOptions("dft")).loss
    divisor = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss / divisor.clamp_min(1)
