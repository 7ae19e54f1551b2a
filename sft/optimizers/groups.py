"""Groups of parameters with a learning rate or weight decay of their own, and parameters that are frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sft.inner_model import causal_lm
from sft.optimizers.rules import ParameterRule

LORA_B = re.compile(r"\.lora_(embedding_)?B(\.|$)")
"""Names of LoRA's second matrix, which starts at zero."""


def freeze(model: nn.Module, rules: Sequence[ParameterRule]) -> None:
    """Freeze the parameters whose first matching rule says so.

    Args:
        model: The model, with its adapter.
        rules: Entries of `parameter_groups`.

    Raises:
        ValueError: A rule matches no trained parameter, or nothing would be trained.
    """
    if not rules:
        return
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = {name: rule for name in names if (rule := _rule_of(name, rules)) is not None}
    for rule in rules:
        if rule not in found.values():
            raise ValueError(_no_match(rule, names, rules))
    for name, rule in found.items():
        if rule.frozen:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("parameter_groups freezes all parameters, so that nothing would be trained")


def _rule_of(name: str, rules: Sequence[ParameterRule]) -> ParameterRule | None:
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def _no_match(rule: ParameterRule, names: Sequence[str], rules: Sequence[ParameterRule]) -> str:
    if any(re.search(rule.pattern, name) for name in names):
        return f"parameter_groups: all parameters that match {rule.pattern!r} match an earlier pattern; remove one"
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-3:]]
    return f"parameter_groups: {rule.pattern!r} matches no trained parameter; their names are {', '.join(shown)}"


def embedding_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of the embeddings and the head, of trained token rows and adapters on them."""
    inner = causal_lm(model)
    modules = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def check_rates(
    model: nn.Module, embedding_learning_rate: float | None = None, loraplus_lr_ratio: float | None = None
) -> None:
    """Check that learning rates of embeddings and of LoRA's second matrices have an effect.

    Args:
        model: The model, with its adapter.
        embedding_learning_rate: Option of that name.
        loraplus_lr_ratio: Option of that name.

    Raises:
        ValueError: No such parameter is trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if embedding_learning_rate is not None:
        embeddings = embedding_parameters(model)
        if not any(id(parameter) in embeddings for parameter in trained.values()):
            raise ValueError(
                f"embedding_learning_rate={embedding_learning_rate} would have no effect: neither embeddings nor head "
                "are trained; train all weights, or name them in modules_to_save"
            )
    if loraplus_lr_ratio is not None and not any(LORA_B.search(name) for name in trained):
        raise ValueError(
            f"loraplus_lr_ratio={loraplus_lr_ratio} would have no effect: no LoRA matrices are trained; leave it out"
        )


def regroup(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    learning_rate: float,
    rules: Sequence[ParameterRule] = (),
    embedding_learning_rate: float | None = None,
    loraplus_lr_ratio: float | None = None,
) -> None:
    """Divide the groups of an optimizer that has not stepped yet, so that each part has its own rate and decay.

    Of several options for one parameter, the first that applies decides: its rule, the rate of embeddings, LoRA+.
    Groups with the common rate are put first, since the rate of the first group is logged.

    Args:
        optimizer: Changed in place.
        model: The model whose parameters it has.
        learning_rate: The common peak rate.
        rules: Entries of `parameter_groups`.
        embedding_learning_rate: Peak rate of embeddings and head.
        loraplus_lr_ratio: Rate of LoRA's second matrices, divided by the common one (LoRA+, arXiv:2402.12354).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = embedding_parameters(model) if embedding_learning_rate is not None else set()

    def changes(parameter: nn.Parameter) -> dict[str, float]:
        name = names.get(id(parameter), "")
        rule = _rule_of(name, rules)
        found: dict[str, float] = {}
        if rule is not None and rule.weight_decay is not None:
            found["weight_decay"] = float(rule.weight_decay)
        if rule is not None and rule.learning_rate is not None:
            found["lr"] = float(rule.learning_rate)
        elif id(parameter) in embeddings:
            found["lr"] = float(embedding_learning_rate or 0.0)
        elif loraplus_lr_ratio is not None and LORA_B.search(name):
            found["lr"] = learning_rate * loraplus_lr_ratio
        return found

    groups = [part for group in optimizer.param_groups for part in _parts(group, changes)]
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr"] != learning_rate)


def _parts(group: dict[str, Any], changes: Any) -> Iterable[dict[str, Any]]:
    parts: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(tuple(changes(parameter).items()), []).append(parameter)
    return [{**group, **dict(change), "params": parameters} for change, parameters in parts.items()]
