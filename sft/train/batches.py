"""The attention of one training: chosen for its device and precision, set on the model, and probed."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel

from sft.attention.choice import (
    SFT_DOCUMENTS,
    check_attention_request,
    check_flash_sdp,
    choose_packed_attention,
    flash_sdp_only,
    probe_isolation,
    refuse_packing_reason,
)
from sft.attention.kernels import has_row_kernel
from sft.config import SFTConfig
from sft.hardware import Hardware, current_hardware
from sft.inner_model import causal_lm, learns_prompt
from sft.models.loading import MIXED_PRECISIONS

logger = logging.getLogger(__name__)

READERS = ("compute_loss", "training_step", "prediction_step", "_prepare_inputs", "get_batch_samples")
"""Methods of a trainer that are given batches."""


def settle_batches(trainer: Any, trainer_class: type, *, flat: bool | None) -> str:
    """Set the attention for the batches, and decide whether they are flat where nobody said so.

    Args:
        trainer: An `SFTTrainer` whose model is on the device that will train it. Its collator is set to flat batches
            where these were chosen.
        trainer_class: `SFTTrainer`, whose own methods read joined rows.
        flat: Whether batches are one row without padding; None = where that is faster and nothing needs padded ones.

    Returns:
        One line that says what was chosen and why.

    Raises:
        ValueError: see `settle_attention`; not where the choice was ours.
    """
    model, config = trainer.model, trainer.args
    if flat is not None:
        return settle_attention(model, config, flat=flat)
    reason = refuse_flat_reason(trainer, trainer_class, current_hardware(config.device))
    before = model.config._attn_implementation
    if reason is None:
        try:
            chosen = settle_attention(model, config, flat=True)
        except (ValueError, RuntimeError, ImportError) as error:  # a leak, or a kernel that does not run here
            model.set_attn_implementation(before)
            reason = str(error).splitlines()[0]
        else:
            trainer.data_collator.padding_free = True
            return f"batches are joined rows without padding; {chosen}"
    return f"{settle_attention(model, config, flat=False)}: {reason}"


def refuse_flat_reason(trainer: Any, trainer_class: type, hardware: Hardware) -> str | None:
    """Why batches had better be padded where nobody said how they should be, or None when nothing speaks for it.

    Args:
        trainer: An `SFTTrainer` with its own collator.
        trainer_class: `SFTTrainer`; a method that a subclass or a script replaced may expect padded batches.
        hardware: See `current_hardware`.
    """
    model, config = trainer.model, trainer.args
    if trainer.compute_loss_func is not None or trainer.compute_metrics is not None:
        return "compute_loss_func and compute_metrics are given one row for each example"
    own = [
        name
        for name in READERS
        if getattr(getattr(trainer, name), "__func__", None) is not getattr(trainer_class, name)
    ]
    if own:
        return f"{own[0]} is the script's own, and may read padded batches"
    for option in ("pad_to_multiple_of", "torch_compile", "force_flash_sdp", "parallelism_config", "deepspeed"):
        if getattr(config, option, None):
            return f"{option} is set"
    if config.accelerator_config.dispatch_batches:
        return "accelerator_config.dispatch_batches divides batches among processes"
    if not isinstance(causal_lm(model), PreTrainedModel):
        return "the model is not transformers' own"
    return _refuse_flat_attention(model, config, hardware)


def _refuse_flat_attention(model: Any, config: SFTConfig, hardware: Hardware) -> str | None:
    text_config = causal_lm(model).config.get_text_config()
    if requested_attention(model) not in ("auto", SFT_DOCUMENTS):
        return f"attn_implementation={text_config._attn_implementation!r} was asked for"
    if getattr(text_config, "output_attentions", False):
        return "output_attentions is set"
    if getattr(text_config, "attention_chunk_size", None) is not None:
        return "layers attend in chunks"
    if learns_prompt(model):
        return "prompt tuning puts its tokens before each row"
    if model.device.type != config.device.type:
        return "the model is not on its device yet"
    reason = refuse_packing_reason(model)
    if reason is not None or hardware.device_type == "cpu":
        return reason
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if not has_row_kernel(hardware, computed_in(model, config), head_dim):
        return "this device has no kernel that takes documents of many lengths at once"
    return None


def computed_in(model: Any, config: SFTConfig) -> Any:
    """The precision of attention's products: that of mixed precision, or the model's own."""
    return MIXED_PRECISIONS[config.autocast_precision] if config.autocast_precision else model.dtype


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
    dtype = computed_in(model, config)
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
