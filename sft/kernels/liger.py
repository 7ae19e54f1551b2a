"""Liger's Triton kernels (arXiv:2410.10989): where they run, and how they go together with the loss of this library."""

from __future__ import annotations

import inspect
from importlib import import_module

from torch import nn

from sft.hardware import Hardware
from sft.inner_model import causal_lm
from sft.suggest import did_you_mean

TRITON_DEVICES = ("cuda", "xpu", "npu")
OWN_LOSS = ("cross_entropy", "fused_linear_cross_entropy")
"""Liger's kernels that the loss of this library stands in for."""


def check_liger_hardware(hardware: Hardware) -> None:
    """Refuse `use_liger_kernel` on a device that Triton cannot compile for; ask before anything is loaded.

    Args:
        hardware: of the device that will train, see `sft.hardware.current_hardware`.

    Raises:
        ValueError: names the device, or the packages, and the way out.
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
            "use_liger_kernel=False: the loss without logits in memory is there on any device."
        )
    if hardware.device_type == "cuda" and hardware.capability < (7, 0):
        raise ValueError(
            "use_liger_kernel=True cannot be used: Triton needs compute capability 7.0, and the GPU has "
            f"{hardware.capability[0]}.{hardware.capability[1]}. Set use_liger_kernel=False."
        )


def interpreting() -> bool:
    """Whether Triton runs its programs in Python (`TRITON_INTERPRET=1`), which any device can do, very slowly."""
    return bool(import_module("triton").knobs.runtime.interpret)


def liger_kernel_config(model: nn.Module, given: dict[str, bool] | None = None) -> dict[str, bool]:
    """Which of Liger's kernels a model gets: all that Liger has for its family, but for those of the loss.

    Liger's fused linear cross entropy lives in the model's `forward` and runs when that is given labels. The loss here
    never gives it labels: it fuses head and loss itself, runs the head on supervised tokens alone, and yields token
    accuracy, entropy and weighted sums on the way. Both together would be one head too many.

    `transformers.Trainer` puts the kernels into the model when training begins. Rotary embeddings are replaced for all
    models of the family in the process.

    Args:
        model: causal or vision-language model, wrapped or not.
        given: the user's `liger_kernel_config`.

    Returns:
        A complete `liger_kernel_config`.

    Raises:
        ValueError: Liger has no kernels for this family, or a key that would have no effect is given.
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
                "cross entropy itself. Leave it out."
            )
    return {**(given or {}), **{name: False for name in OWN_LOSS if name in kernels}}
