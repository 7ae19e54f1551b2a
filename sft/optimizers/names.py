"""Names of optimizers: the packages and devices that they need, and the arguments that they read. Imports no torch.

transformers looks for a package when training begins, after the model was loaded, and skips arguments in `optim_args`
that an optimizer does not read. Here both are checked before.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

from sft.suggest import did_you_mean

MUON = "muon"

OWN_OPTIMIZERS = (MUON,)
"""Optimizers of this library; all others are those of transformers."""


class Package(NamedTuple):
    """A package that optimizers need.

    Args:
        module: Name under which it is imported.
        project: Name under which it is installed.
    """

    module: str
    project: str


PACKAGES = {
    "adamw_torch_xla": Package("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": Package("torch_npu", "torch_npu"),
    "adamw_anyprecision": Package("torchdistx", "torchdistx (https://github.com/pytorch/torchdistx)"),
    "adamw_torch_4bit": Package("torchao", "torchao"),
    "adamw_torch_8bit": Package("torchao", "torchao"),
    "ademamix": Package("bitsandbytes", "bitsandbytes"),
    "adamw_bnb_8bit": Package("bitsandbytes", "bitsandbytes"),
    "adamw_8bit": Package("bitsandbytes", "bitsandbytes"),
    "lion_": Package("bitsandbytes", "bitsandbytes"),
    "paged_": Package("bitsandbytes", "bitsandbytes"),
    "rmsprop_bnb": Package("bitsandbytes", "bitsandbytes"),
    "galore_": Package("galore_torch", "galore-torch"),
    "apollo_": Package("apollo_torch", "apollo-torch"),
    "lomo": Package("lomo_optim", "lomo-optim"),
    "adalomo": Package("lomo_optim", "lomo-optim"),
    "grokadamw": Package("grokadamw", "grokadamw"),
    "schedule_free_": Package("schedulefree", "schedulefree"),
    "stable_adamw": Package("optimi", "torch-optimi"),
}
"""Beginning of an optimizer's name -> the package that it needs."""

CUDA_ONLY = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise", "adalomo", "stable_adamw")
"""Optimizers whose kernels run on GPUs only."""

IN_BACKWARD = ("lomo", "adalomo")
"""Optimizers that update each weight in the backward pass, before the gradient's norm is known."""

LAYERWISE = "_layerwise"
"""End of the names of optimizers that update each weight in the backward pass, and whose state no checkpoint has."""

_LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")

ARGUMENTS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "galore_": _LOW_RANK,
    "apollo_": (*_LOW_RANK, "proj", "scale_type"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "schedule_free_": ("weight_lr_power", "r"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    "ademamix": ("beta3", "alpha", "t_alpha", "t_beta3"),
    "paged_ademamix": ("beta3", "alpha", "t_alpha", "t_beta3"),
    "adamw_torch_4bit": ("bf16_stochastic_round",),
    "adamw_torch_8bit": ("bf16_stochastic_round",),
    "adamw_anyprecision": ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    MUON: ("momentum", "nesterov", "ns_steps"),
}
"""Beginning of an optimizer's name -> the arguments in `optim_args` that it reads."""


def updates_in_backward(optim: str) -> bool:
    """Return whether an optimizer updates each weight in the backward pass, and keeps no gradient."""
    return optim in IN_BACKWARD or optim.endswith(LAYERWISE)


def check_package(optim: str) -> None:
    """Check that the package of an optimizer is installed, without importing it.

    Raises:
        ValueError: It is not; the message says what to install.
    """
    package = _of(optim, PACKAGES)
    if package is not None and find_spec(package.module) is None:
        raise ValueError(f"optim={optim!r} needs the package {package.module}: pip install {package.project}")


def check_device(optim: str, device_type: str) -> None:
    """Check that an optimizer runs on a type of device.

    Raises:
        ValueError: It does not.
    """
    if optim in CUDA_ONLY and device_type != "cuda":
        raise ValueError(f"optim={optim!r} runs on CUDA devices only, and this training runs on {device_type}")


def check_optim_args(optim: str, arguments: dict[str, Any]) -> None:
    """Check that an optimizer reads all arguments of `optim_args`.

    Raises:
        ValueError: It does not read one.
    """
    known: tuple[str, ...] = _of(optim, ARGUMENTS) or ()
    for name in arguments:
        if name not in known:
            there_are = f"it reads {', '.join(known)}" if known else "it reads none; leave optim_args out"
            hint = did_you_mean(name, known, otherwise=there_are)
            raise ValueError(f"optim_args has {name!r}, which optim={optim!r} does not read: {hint}")


def parse_optim_args(text: str | None) -> dict[str, str]:
    """Parse `optim_args`, such as `momentum=0.9,nesterov=true`.

    Raises:
        ValueError: A part is not of the form NAME=VALUE.
    """
    arguments = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"optim_args={text!r}: {part!r} is not of the form NAME=VALUE")
        arguments[name] = value
    return arguments


def _of(optim: str, table: dict[str, Any]) -> Any:
    """Return the entry whose key is the longest beginning of a name; None if there is none.

    Keys that end with an underscore stand for several optimizers, as do those of the 8- and 32-bit forms.
    """
    fitting = [key for key in table if optim == key or (optim.startswith(key) and key not in ("rmsprop", "lomo"))]
    return table[max(fitting, key=len)] if fitting else None
