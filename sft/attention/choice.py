"""Choice of the attention for packed batches, and checks that this machine can run a requested one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sft.attention.kernels import SFT_DOCUMENTS
from sft.hardware import HALF_PRECISIONS, Hardware, current_hardware
from sft.inner_model import causal_lm


@dataclass(frozen=True)
class AttentionChoice:
    """An `attn_implementation`, and the reason for it in one line."""

    implementation: str
    reason: str


@dataclass(frozen=True)
class _FlashPackage:
    """Requirements of one version of Flash Attention.

    Attributes:
        capability: Lowest CUDA compute capability.
        module: Name to import.
        pip_name: Name to install.
    """

    capability: tuple[int, int]
    module: str
    pip_name: str


FLASH_PACKAGES = {
    "2": _FlashPackage((8, 0), "flash_attn", "flash-attn"),
    "3": _FlashPackage((9, 0), "flash_attn_interface", "flash-attn-3"),
    "4": _FlashPackage((9, 0), "flash_attn", "flash-attn-4"),
}
"""Version of Flash Attention -> its requirements."""


def check_attention_request(requested: str, dtype: torch.dtype, hardware: Hardware) -> None:
    """Check that this machine can run an `attn_implementation`.

    Args:
        requested: Name as transformers spells it.
        dtype: Precision that attention runs in: the model's, or that of autocast.
        hardware: See `current_hardware`.

    Raises:
        ValueError: It can't; the message lists what was requested, what is missing and what to use.
    """
    problems = []
    flash, from_hub = _flash_package(requested), "/" in requested
    if requested.startswith("paged|"):
        problems.append("it serves generation with a paged cache and has no backward pass")
    elif (flash or from_hub or requested == "flex_attention") and hardware.device_type != "cuda":
        problems.append(f"it trains on CUDA devices only, and the model is on {hardware.device_type!r}")
    if flash and dtype not in HALF_PRECISIONS:
        problems.append(f"it takes float16 or bfloat16, and the model computes in {dtype} (set bf16=True or a dtype)")
    if flash and hardware.device_type == "cuda" and hardware.capability < flash.capability:
        needed = f"{flash.capability[0]}.{flash.capability[1]}"
        problems.append(f"it needs compute capability {needed}, and the GPU has {_dotted(hardware)}")
    # if a flash package is missing and `kernels` is installed, transformers downloads a kernel from the hub instead
    if from_hub and "kernels" not in hardware.packages:
        problems.append("the package that downloads it is not installed (pip install kernels)")
    elif flash and not from_hub and not hardware.packages & {flash.module, "kernels"}:
        problems.append(f"the package that provides it is not installed (pip install {flash.pip_name})")
    if problems:
        raise ValueError(
            f"attn_implementation={requested!r} cannot be used: {'; '.join(problems)}. Use 'sdpa' or 'auto'."
        )


def _dotted(hardware: Hardware) -> str:
    return f"{hardware.capability[0]}.{hardware.capability[1]}"


def _flash_package(requested: str) -> _FlashPackage | None:
    """Return the version of Flash Attention that a name of transformers or of a hub kernel means, or None.

    A name without a number means version 2.
    """
    found = re.search(r"flash[-_]att(?:ention|n)[-_]?(\d?)", requested)
    return FLASH_PACKAGES.get(found[1] or "2") if found else None


def check_flash_sdp(attention: str, dtype: torch.dtype, hardware: Hardware, flat: bool) -> None:
    """Check that `force_flash_sdp` can be honoured: torch's own flash kernel is used and can run here.

    Args:
        attention: The `attn_implementation` in use.
        dtype: Precision that attention runs in: the model's, or that of autocast.
        hardware: See `current_hardware`.
        flat: Whether batches are packed or padding-free.

    Raises:
        ValueError: It can't; the message lists everything that is missing, with the options to set.
    """
    problems = []
    if not flat:
        problems.append("it needs packing=True or padding_free=True, since the kernel does not support masks")
    if attention not in ("auto", "sdpa", SFT_DOCUMENTS):
        problems.append(f"attn_implementation={attention!r} does not use that kernel: set it to 'sdpa'")
    if hardware.device_type not in ("cpu", "cuda"):
        problems.append(f"torch has that kernel for CUDA and CPU, and the model is on {hardware.device_type!r}")
    if hardware.device_type == "cuda" and dtype not in HALF_PRECISIONS:
        problems.append(f"on a GPU it takes float16 or bfloat16, and the model computes in {dtype} (set bf16=True)")
    if hardware.device_type == "cuda" and hardware.capability < (8, 0):
        problems.append(f"it needs compute capability 8.0, and the GPU has {_dotted(hardware)}")
    if problems:
        raise ValueError(f"force_flash_sdp=True cannot be used: {'; '.join(problems)}. Or set force_flash_sdp=False.")


def choose_packed_attention(
    model: torch.nn.Module, requested: str | None, hardware: Hardware | None = None, dtype: torch.dtype | None = None
) -> AttentionChoice:
    """Choose the attention for packed or padding-free batches.

    Args:
        model: Causal model of transformers, wrapped or not.
        requested: The user's `attn_implementation`; None and "auto" leave the choice to this function.
        hardware: If None, that of the model's device.
        dtype: Precision that attention runs in; if None, the model's.

    Returns:
        A name for `model.set_attn_implementation`, and the reason; the caller tests it with
        `sft.attention.isolation.isolate_documents`. Attention code of a model's own is left as it is.

    Raises:
        ValueError: This machine can't run the requested attention.
    """
    base = causal_lm(model)
    hardware = hardware or current_hardware(base.device)
    requested = requested or "auto"
    check_attention_request(requested, dtype or base.dtype, hardware)
    if not base._can_set_attn_implementation():
        return AttentionChoice(base.config._attn_implementation, "the model computes attention in code of its own")
    chunk = getattr(base.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and requested in ("auto", "sdpa", SFT_DOCUMENTS):
        return AttentionChoice("sdpa", f"layers attend in chunks of {chunk}: a mask over the row keeps documents apart")
    if requested in ("auto", "sdpa", SFT_DOCUMENTS):
        return AttentionChoice(SFT_DOCUMENTS, "scaled dot product attention document by document, no mask over the row")
    return AttentionChoice(requested, "as requested; position_ids separate the documents")


@contextmanager
def flash_sdp_only() -> Iterator[None]:
    """Allow only the flash kernel of torch's `scaled_dot_product_attention` inside the block.

    The kernel does not support a mask, so batches must be packed or padding-free, see `check_flash_sdp`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
