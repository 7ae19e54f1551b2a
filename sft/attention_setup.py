"""The attention of one training: chosen for its device and precision, set on the model, and probed."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

from sft.attention import (
    SFT_DOCUMENTS,
    check_attention_request,
    check_flash_sdp,
    choose_packed_attention,
    flash_sdp_only,
    probe_isolation,
)
from sft.config import SFTConfig
from sft.hardware import current_hardware
from sft.models import MIXED_PRECISIONS
from sft.unwrapping import causal_lm

logger = logging.getLogger(__name__)


def settle_attention(model: Any, config: SFTConfig, *, flat: bool) -> str:
    """Choose and set the attention for flat batches, and prove that documents do not see each other.

    Args:
        model: On the device that will train it.
        config: `force_flash_sdp`, and the precision of the products.
        flat: Whether batches are one row without padding.

    Returns:
        One line that says what was chosen and why.

    Raises:
        ValueError: The device, the model or its attention can't keep the documents of a row apart.
    """
    current = model.config._attn_implementation
    requested = requested_attention(model)
    hardware = current_hardware(config.device)
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else None
    dtype = MIXED_PRECISIONS[precision] if precision else model.dtype
    if config.force_flash_sdp:
        check_flash_sdp(requested, dtype, hardware, flat)
    if not flat:
        check_attention_request(requested, dtype, hardware)
        return f"attention {current} on padded batches"
    choice = choose_packed_attention(model, requested, hardware, dtype)
    if config.force_flash_sdp and choice.implementation != SFT_DOCUMENTS:
        raise ValueError(
            f"force_flash_sdp=True cannot be used: torch's flash kernel takes no mask, and {choice.reason}. Set "
            "force_flash_sdp=False."
        )
    if choice.implementation != current:
        model.set_attn_implementation(choice.implementation)
    if model.device.type != config.device.type:  # FSDP and DeepSpeed move it later, piece by piece
        logger.warning("the model is not on its device yet: %s is not probed for leaks", choice.implementation)
    else:
        with flash_sdp_only() if config.force_flash_sdp else nullcontext():
            probe_isolation(model)
    return f"attention {choice.implementation}: {choice.reason}"


def requested_attention(model: Any) -> str:
    """The attention that the user asked for; `auto` where it is what transformers takes for this family by itself."""
    current = model.config._attn_implementation
    own_choice = "sdpa" if causal_lm(model)._supports_sdpa else "eager"
    return "auto" if current in ("sdpa", own_choice) else current
