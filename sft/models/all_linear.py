"""Targets of `all-linear`: every linear layer of a model but its head, its experts, and not its routers.

peft itself takes each `nn.Linear`, which is something else where a mixture of experts is concerned:

- Experts are stacked into 3-D parameters. peft adapts them for some families only, and then drops linear layers
  (of dense blocks and shared experts) that have the names of the experts' former layers.
- Routers are linear layers in some families. An adapted router changes which experts a token is sent to, and drifts
  without a balancing loss.

Here the names are resolved before peft sees them, so that all families are treated alike.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft.inner_model import in_training
from sft.models.weight_kinds import Weight, as_percent, num_values, stacked_experts, weights_of

logger = logging.getLogger(__name__)

PLAIN = (torch.nn.Linear, Conv1D)
"""Classes of linear layers that LoRA's own product fits."""

BYPASSED = "the model reads their weights without calling them, so that an adapter would have no effect"

ALL_LINEAR = "all-linear"

NO_PARAMETERS = {
    "lora_dropout": 0.0,
    "use_dora": False,
    "lora_bias": False,
    "kasa_config": None,
    "velora_config": None,
    "fan_in_fan_out": False,
}
"""Options of LoRA, with the values that they must have for peft to adapt parameters."""

STARTS = ("True", "False", "gaussian")
"""Starts of LoRA that peft has for parameters, see `sft.models.adapter_starts`; the others need a layer's weight."""


NO_MAMBA = "peft adapts no layer of this name in Mamba models, whose kernels read the weight themselves"

QUANTIZED = "peft takes their names for those of experts, and cannot adapt quantized parameters"

OTHER_PARAMETERS = "these are parameters and not layers; to train them, too, name them in target_parameters"

PROMISED = ("attention", "MLP", "experts")
"""Kinds of weights whose matrices `all-linear` seems to promise."""

BIAS = re.compile(r"(^|_)bias(es)?$")


@dataclass(frozen=True)
class LinearTargets:
    """What `all-linear` means for a model.

    Attributes:
        modules: Names of linear layers that get an adapter.
        parameters: Names of parameters that get one: experts, and weights of linear layers that peft would confuse with
            former layers of experts.
        routers: Names of the routers' weights, which get none.
        left_out: Names of further weights that get none -> the reason.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    routers: tuple[str, ...]
    left_out: dict[str, str]


def is_all_linear(config: PeftConfig) -> bool:
    """Return whether a configuration asks for all linear layers; peft ignores the case."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def resolve_all_linear(config: PeftConfig, targets: LinearTargets) -> PeftConfig:
    """Return a configuration with the given targets in place of `all-linear`.

    Args:
        config: Configuration with `all-linear`. Its `target_parameters` decide about experts: None adapts them, a list,
            which may be empty, those that it names.
        targets: What `linear_targets` returns for the model.
    """
    if not (targets.parameters or targets.routers or targets.left_out):
        return config  # as peft reads it
    config = copy.deepcopy(config)
    config.target_modules = set(targets.modules)
    if targets.parameters:
        config.target_parameters = [*(config.target_parameters or []), *targets.parameters]
    return config


def add_dropped_layers(model: PreTrainedModel, config: PeftConfig) -> PeftConfig:
    """Return a configuration that also reaches linear layers which it names and peft would drop.

    In families whose experts were layers once, peft takes names such as `gate_proj` for theirs alone, although dense
    blocks and shared experts have layers of these names.

    Args:
        model: The base, without adapters.
        config: Configuration with names or a regular expression as targets.
    """
    if not getattr(config, "target_modules", None):
        return config
    takes = cache(partial(_takes, model, config))
    dropped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and check_target_module_exists(config, name)
        and takes(name.rpartition(".")[2]) == "parameter"
    ]
    if not dropped:
        return config
    why_not = _why_no_parameters(config)
    plain = [name for name in dropped if why_not is None and type(model.get_submodule(name)) is torch.nn.Linear]
    if len(plain) < len(dropped):
        logger.warning(
            "target_modules names layers of %s that get no adapter (%s): %s",
            type(model).__name__,
            ", ".join(_last_parts(set(dropped) - set(plain))),
            why_not or QUANTIZED,
        )
    if not plain:
        return config
    config = copy.deepcopy(config)
    names = [weight.name for weight in weights_of(model) if weight.name is not None]
    weights = _shortest([f"{name}.weight" for name in plain], names)
    config.target_parameters = [*(config.target_parameters or []), *weights]
    return config


def linear_targets(model: PreTrainedModel, config: PeftConfig) -> LinearTargets:
    """Sort the matrices of a model into those that `all-linear` adapts and those that it does not.

    Args:
        model: The base, without adapters.
        config: Configuration with `all-linear`. What it excludes is neither adapted nor reported.
    """
    weights = {weight.name: weight for weight in weights_of(model) if weight.name is not None}
    routers = [name for name, weight in weights.items() if weight.kind == "router" and weight.parameter.ndim == 2]
    head, why_not = model.get_output_embeddings(), _why_no_parameters(config)
    modules, parameters, left_out = [], [], {}
    takes, bypassed = cache(partial(_takes, model, config)), bypassed_layers(model)
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or module is head:
            continue
        if weight in routers or not _is_asked(config, name):
            continue
        taken = takes(name.rpartition(".")[2])
        if name in bypassed:
            left_out[weight] = BYPASSED
        elif taken == "layer" and not _computes_itself(module):
            modules.append(name)
        elif taken != "nothing" and why_not is None and (_computes_itself(module) or type(module) in PLAIN):
            parameters.append(weight)
        else:
            left_out[weight] = NO_MAMBA if taken == "nothing" else why_not or QUANTIZED
    stacked = [name for name in stacked_experts(model) if _is_asked(config, name)]
    given = getattr(config, "target_parameters", None)
    if given is None and why_not is None:
        parameters = [*stacked, *parameters]
    elif given is None:
        left_out |= dict.fromkeys(stacked, why_not or "")
    return LinearTargets(tuple(modules), tuple(_shortest(parameters, weights)), tuple(routers), left_out)


def bypassed_layers(model: PreTrainedModel) -> set[str]:
    """Return the linear layers whose weight a model reads without calling them, as Mamba's `dt_proj`.

    1. Run the model on a few tokens, in training mode, and note which linear layers are called.
    2. Of the others, those whose weight has a gradient are read. Experts that got no token have none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PLAIN)}
    weights = [module.weight for module in layers.values()]
    if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        return set()
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in layers.items()
    ]
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(1, 9, device=embeddings.device)[None] % embeddings.shape[0]
    devices = [embeddings.device] if embeddings.is_cuda else []
    try:
        with in_training(model), torch.random.fork_rng(devices), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception:  # a model may need more than token ids; training says what
        return set()
    finally:
        for handle in handles:
            handle.remove()
    rest = {name: module.weight for name, module in layers.items() if name not in called}
    if not rest:
        return set()
    trained = [weight.requires_grad for weight in rest.values()]
    try:
        for weight in rest.values():
            weight.requires_grad_(True)
        with in_training(model), torch.random.fork_rng(devices), torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            gradients = torch.autograd.grad(logits.float().square().mean(), list(rest.values()), allow_unused=True)
    finally:
        for weight, before in zip(rest.values(), trained, strict=True):
            weight.requires_grad_(before)
    return {name for name, gradient in zip(rest, gradients, strict=True) if gradient is not None}


def _computes_itself(module: torch.nn.Module) -> bool:
    """Return whether a kind of linear layer has a forward of its own on a plain weight.

    DeepSeek V4's runs one product per group of heads. LoRA's own product would not fit such a layer, but a LoRA update
    of its weight does.
    """
    weight = module.weight
    plain = type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
    return plain and all(type(module).forward is not kind.forward for kind in PLAIN)


def _takes(model: PreTrainedModel, config: PeftConfig, leaf: str) -> str:
    """Return what peft makes of a linear layer of this name in this family: a layer, a parameter, or nothing."""
    try:
        _check_lora_target_modules_mamba(config, model, leaf)
    except ValueError:
        return "nothing"
    probe = copy.deepcopy(config)
    probe.target_modules = {leaf}
    try:
        convert_peft_config_for_transformers(probe, model, get_model_conversion_mapping(model))
    except ValueError:  # several former layers became one parameter, and the others are not named
        return "parameter"
    return "layer" if leaf in probe.target_modules else "parameter"


def _why_no_parameters(config: PeftConfig) -> str | None:
    """Return why peft cannot adapt parameters with this configuration; None if it can."""
    if type(config) is not LoraConfig:
        return f"adapters of type {config.peft_type.value} cannot change parameters; LoRA can"
    for option, needed in NO_PARAMETERS.items():
        value = getattr(config, option, needed)
        if value not in (needed, None):
            return f"peft cannot adapt parameters with {option}={value}; set it to {needed}"
    if str(config.init_lora_weights) not in STARTS:
        return f"peft cannot adapt parameters with init_lora_weights={config.init_lora_weights!r}; set it to True"
    return None


def _is_asked(config: PeftConfig, name: str) -> bool:
    """Return whether neither `exclude_modules` nor `modules_to_save` names a layer, or a parameter and its module."""
    probe = copy.copy(config)
    names = {name, name.rpartition(".")[0]}
    probe.target_modules = names
    return all(check_target_module_exists(probe, each) for each in names)


def _shortest(names: list[str], all_names: Iterable[str]) -> list[str]:
    """Return the last two parts of the names if these mean the same parameters, else the names.

    Args:
        names: Names of parameters.
        all_names: Names of all parameters of the model.
    """
    short = _last_parts(names)
    meant = [name for name in all_names if name.endswith(tuple(f".{part}" for part in short))]
    return short if sorted(meant) == sorted(names) else sorted(names)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def log_left_out(model: PeftModel, targets: LinearTargets) -> None:
    """Log which weights `all-linear` leaves out, and how to train them.

    Args:
        model: The model with the adapter.
        targets: What `linear_targets` returned for its base.
    """
    family, weights = type(model.get_base_model()).__name__, list(weights_of(model))
    reached = {id(weight.changed) for weight in weights if weight.parameter.requires_grad}
    frozen = {weight.name: weight for weight in weights if weight.name and id(weight.parameter) not in reached}
    if any(name in frozen for name in targets.routers):
        logger.info(
            "all-linear leaves out the routers of %s; to train them, too, give target_parameters=%s",
            family,
            [*targets.parameters, *_last_parts(targets.routers)],
        )
    reasons = {
        name: targets.left_out.get(name, OTHER_PARAMETERS)
        for name, weight in frozen.items()
        if name in targets.left_out or _is_matrix(weight)
    }
    total = sum(num_values(weight.parameter) for weight in weights if weight.name)
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        missing = sum(num_values(frozen[name].parameter) for name in names)
        share, listed = as_percent(missing, total), ", ".join(_last_parts(names))
        logger.warning("all-linear leaves out %s, %s of the weights of %s: %s", listed, share, family, reason)


def _is_matrix(weight: Weight) -> bool:
    """Return whether a parameter of the base is a matrix that `all-linear` seems to promise, but no linear layer."""
    is_linear = isinstance(weight.owner, (torch.nn.Linear, Conv1D, torch.nn.Embedding))
    name = str(weight.name).rpartition(".")[2]
    return weight.kind in PROMISED and weight.parameter.ndim >= 2 and not is_linear and BIAS.search(name) is None
