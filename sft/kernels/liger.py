"""Liger's Triton kernels (arXiv:2410.10989): the devices that they run on, and their use with this library's loss."""

from __future__ import annotations

import inspect
from importlib import import_module

from torch import nn

from sft.hardware import Hardware
from sft.inner_model import causal_lm
from sft.suggest import did_you_mean

TRITON_DEVICES = ("cuda", "xpu", "npu")
"""Types of devices that Triton compiles for."""

OWN_LOSS = ("cross_entropy", "fused_linear_cross_entropy")
"""Liger's kernels that the loss of this library replaces."""


def check_liger_hardware(hardware: Hardware) -> None:
    """Check that `use_liger_kernel` can be used on a device; called before anything is loaded.

    Args:
        hardware: Of the device that will train, see `sft.hardware.current_hardware`.

    Raises:
        ValueError: Packages are missing, or Triton does not support the device.
    """
    missing = [name for name in ("triton", "liger_kernel") if name not in hardware.packages]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise ValueError(
            f"use_liger_kernel=True needs packages that are not installed: pip install {packages}. "
            "Or set use_liger_kernel=False."
        )
    if hardware.device_type not in TRITON_DEVICES and not interpreting():
        raise ValueError(
            f"use_liger_kernel=True cannot be used: Liger's kernels are Triton programs, and Triton has no device here "
            f"(training is on {hardware.device_type!r}, Triton compiles for {', '.join(TRITON_DEVICES)}). Set "
            "use_liger_kernel=False: the loss without logits in memory works on any device."
        )
    if hardware.device_type == "cuda" and hardware.capability < (7, 0):
        raise ValueError(
            "use_liger_kernel=True cannot be used: Triton needs compute capability 7.0, and the GPU has "
            f"{hardware.capability[0]}.{hardware.capability[1]}. Set use_liger_kernel=False."
        )


def interpreting() -> bool:
    """Return whether Triton interprets its programs in Python (`TRITON_INTERPRET=1`), very slowly but on any device."""
    return bool(import_module("triton").knobs.runtime.interpret)


def liger_kernel_config(model: nn.Module, given: dict[str, bool] | None = None) -> dict[str, bool]:
    """Return the `liger_kernel_config` of a model: all kernels that Liger has for its family, except those of the loss.

    Liger's fused linear cross entropy is part of the model's `forward` and runs if that is given labels. `sft.loss`
    never passes labels. It fuses head and loss itself, runs the head on supervised tokens only, and computes token
    accuracy, entropy and weighted sums in the same pass.

    `transformers.Trainer` installs the kernels when training begins. Rotary embeddings are replaced for all models of
    the family in the process.

    Args:
        model: Causal or vision-language model, wrapped or not.
        given: The user's `liger_kernel_config`.

    Returns:
        The user's `liger_kernel_config`, with Liger's loss turned off.

    Raises:
        ValueError: Liger has no kernels for this family, or `given` has a key that would have no effect.
    """
    functions = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    family = causal_lm(model).config.model_type
    if family not in functions:
        raise ValueError(
            f"use_liger_kernel=True would have no effect: Liger has no kernels for {family!r} models, only for "
            f"{', '.join(sorted(functions))}. Set use_liger_kernel=False."
        )
    kernels = [name for name in inspect.signature(functions[family]).parameters if name != "model"]
    for name, wanted in (given or {}).items():
        if name not in kernels:
            hint = did_you_mean(name, kernels, after=" ")
            raise ValueError(
                f"liger_kernel_config has {name!r}, which Liger does not have for {family!r} models: {hint}"
                f"Use {', '.join(name for name in kernels if name not in OWN_LOSS)}."
            )
        if name in OWN_LOSS and wanted:
            raise ValueError(
                f"liger_kernel_config asks for {name!r}, which would have no effect: the loss here fuses head and "
                "cross entropy itself. Remove it."
            )
    return {**(given or {}), **{name: False for name in OWN_LOSS if name in kernels}}
