"""Kinds of weights (attention, experts, router, ...), and which share of each kind a training changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from sft.inner_model import causal_lm

KINDS = (
    "attention",
    "recurrent",
    "MLP",
    "experts",
    "router",
    "embeddings",
    "norms",
    "head",
    "vision",
    "prompt",
    "other",
)
"""In the order of logs and reports. `recurrent` stands for linear attention, Mamba and convolutions."""

MATRIX_KINDS = ("attention", "recurrent", "MLP", "experts")
"""Kinds of weights that quantization is for."""

STACKED = ("experts", "MLP")
"""Kinds of weights whose 3-D parameters are matrices of several experts."""

LAYER_KINDS = {
    "vision": re.compile(r"(?i)vision|visual|image|audio"),
    # GPT-2's Conv1D is a linear layer
    "recurrent": re.compile(r"(?i:mamba|linear_attn|delta_?(net|attention)|conv|recurrent|rg_?lru|ssm|rwkv)(?!1D)"),
    "attention": re.compile(r"(?i)attn|attention"),
    "MLP": re.compile(r"(?i)mlp|feed_?forward|ffn|shared_?experts?|moe|^fc_?|^dense_"),
}
"""Kind -> name of a module or of its class. The innermost module that matches decides."""

ROUTERS = re.compile(r"router|gate|gating|wg|moe_statics|shared_experts?_gate")
"""Name of a module, beside experts, that chooses between them or weighs shared experts against them."""

ROUTER_CLASSES = re.compile(r"Router|TopK\w*Gat(e|ing)")


@dataclass(frozen=True)
class Weight:
    """A parameter of a model or of its adapter.

    Attributes:
        name: Name in the model without adapters; None for a parameter of an adapter.
        kind: One of `KINDS`.
        parameter: The parameter.
        changed: The parameter that this one changes when it is trained: itself, or that of the base which an adapter
            is added to.
        owner: Module of the base that has the parameter, or that the adapter changes.
    """

    name: str | None
    kind: str
    parameter: torch.Tensor
    changed: torch.Tensor
    owner: nn.Module


@dataclass(frozen=True)
class WeightShare:
    """How much of one kind of weight is trained.

    Attributes:
        kind: One of `KINDS`.
        num_weights: Number of weights of the base.
        num_reached: Number of those that training changes, themselves or through an adapter.
        num_trained: Number of parameters that are trained, those of the adapter included.
    """

    kind: str
    num_weights: int
    num_reached: int
    num_trained: int

    def __str__(self) -> str:
        return f"{self.kind} {as_percent(self.num_reached, self.num_weights)}"

    def to_dict(self) -> dict[str, int]:
        """Return the numbers by name."""
        return {"weights": self.num_weights, "reached": self.num_reached, "trained": self.num_trained}


def as_percent(part: int, whole: int) -> str:
    """Format a share; only nothing is `0 %`, and only everything is `100 %`."""
    share = 100 * part / max(whole, 1)
    if 0 < share < 1:
        return "<1 %"
    return ">99 %" if 99 < share < 100 else f"{share:.0f} %"


def weight_shares(model: nn.Module) -> list[WeightShare]:
    """Return how much of each kind of weight is trained, for the kinds that the model has.

    Args:
        model: Model, wrapped or not, with or without adapters.
    """
    weights, reached, trained = (dict.fromkeys(KINDS, 0) for _ in range(3))
    changed = set()
    for weight in weights_of(model):
        if weight.name is not None:
            weights[weight.kind] += num_values(weight.parameter)
        if weight.parameter.requires_grad:
            trained[weight.kind] += num_values(weight.parameter)
            if id(weight.changed) not in changed:
                changed.add(id(weight.changed))
                reached[weight.kind] += num_values(weight.changed)
    present = [kind for kind in KINDS if weights[kind] or trained[kind]]
    return [WeightShare(kind, weights[kind], reached[kind], trained[kind]) for kind in present]


def num_values(parameter: torch.Tensor) -> int:
    """Return the number of values of a parameter; a byte of a 4-bit tensor counts as two."""
    size = parameter.numel()
    return size * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else size


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Yield the parameters of a model and of its adapter with their kinds, a tied one once.

    Args:
        model: Model, wrapped or not, with or without adapters.
    """
    seen: set[int] = set()
    base = causal_lm(model)
    for weight in _walk(base, [], _Places(base)):
        if id(weight.parameter) not in seen:
            seen.add(id(weight.parameter))
            yield weight
    for parameter in model.parameters():
        if id(parameter) not in seen:  # prompt tuning
            yield Weight(None, "prompt", parameter, parameter, model)


Path = list[tuple[str, nn.Module]]
"""Names and modules from the outermost to the innermost one, without the layers of peft."""


def _walk(module: nn.Module, path: Path, places: _Places) -> Iterator[Weight]:
    wraps = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    if not wraps:
        for name, parameter in module.named_parameters(recurse=False):
            full_name = ".".join([*(part for part, _ in path), name])
            yield Weight(full_name, places.kind(path, module), parameter, parameter, module)
        for name, child in module.named_children():
            yield from _walk(child, [*path, (name, unwrapped(child))], places)
        return
    inner: Any = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
    yield from _walk(inner, path, places)
    base = unwrapped(module)
    changed = getattr(base, getattr(module, "parameter_name", "weight"), None)
    inside = {id(parameter) for parameter in inner.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in inside:
            in_full = isinstance(module, AuxiliaryTrainingWrapper) or not isinstance(changed, torch.Tensor)
            yield Weight(None, places.kind(path, base), parameter, parameter if in_full else changed, base)


def unwrapped(module: Any) -> nn.Module:
    """Return the module inside layers of peft; a plain module as it is."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
    return module


class _Places:
    """Finds the kind of a weight by the names and classes of the modules around it.

    Args:
        base: transformers' model, with or without the layers of an adapter.
    """

    def __init__(self, base: Any) -> None:
        embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
        self._embeddings = None if embeddings is None else unwrapped(embeddings)
        self._head = None if head is None else unwrapped(head)
        # a module that holds experts may itself be one of attention, as in JetMoE
        self._moe_blocks = {
            id(module)
            for module in base.modules()
            for name, child in module.named_children()
            if is_experts(name, unwrapped(child))
        }

    def kind(self, path: Path, owner: nn.Module) -> str:
        if owner is self._head:
            return "head"
        in_layer = any(name.isdigit() for name, _ in path)
        if owner is self._embeddings or (isinstance(owner, nn.Embedding) and not in_layer):
            return "embeddings"
        if any(self._is_router(path[:depth]) for depth in range(2, len(path) + 1)):
            return "router"
        if id(owner) in self._moe_blocks or any(is_experts(name, module) for name, module in path):
            return "experts"
        if "norm" in type(owner).__name__.lower() or (path and "norm" in path[-1][0].lower()):
            return "norms"
        for name, module in reversed(path):
            for kind, pattern in LAYER_KINDS.items():
                if pattern.search(name) or pattern.search(type(module).__name__):
                    return kind
        return "other"

    def _is_router(self, path: Path) -> bool:
        (_, parent), (name, module) = path[-2:]
        is_named = id(parent) in self._moe_blocks and ROUTERS.fullmatch(name) is not None
        return is_named or ROUTER_CLASSES.search(type(module).__name__) is not None


def is_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module holds the weights of experts between which a router chooses."""
    kind = type(module).__name__
    return ("experts" in name and "shared" not in name) or ("Experts" in kind and "Shared" not in kind)


def router_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that choose between experts, or weigh shared ones against them."""
    return [
        str(weight.name).rpartition(".")[0]
        for weight in weights_of(model)
        if weight.kind == "router" and isinstance(weight.owner, nn.Linear) and str(weight.name).endswith(".weight")
    ]


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """Return the parameters that hold matrices of several experts, and which are not layers -> their sizes."""
    return {
        str(weight.name): num_values(weight.parameter)
        for weight in weights_of(model)
        if weight.name is not None and weight.kind in STACKED and weight.parameter.ndim == 3
    }


def is_expert(weight: Weight) -> bool:
    """Return whether a weight is of experts between which a router chooses, whatever form these have."""
    return weight.kind == "experts" or (weight.kind in STACKED and weight.parameter.ndim == 3)


def matrices_outside_layers(model: nn.Module) -> list[Weight]:
    """Return the matrices that are not weights of `torch.nn.Linear` itself, of GPT-2's Conv1D, or of convolutions.

    bitsandbytes quantizes the former two, and no class derived from them. Weights that it has quantized are not listed.
    """
    return [
        weight
        for weight in weights_of(model)
        if weight.name is not None
        and weight.kind in MATRIX_KINDS
        and weight.parameter.ndim >= 2
        and not weight.name.endswith("bias")
        and type(weight.owner) not in (nn.Linear, Conv1D)
        and type(weight.parameter).__name__ not in ("Params4bit", "Int8Params")
        and not isinstance(weight.owner, _ConvNd)
    ]
