"""Base models in 4 and 8 bits (bitsandbytes): configuration, placement, and preparation for training an adapter."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import peft
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedModel

from sft.hardware import HALF_PRECISIONS
from sft.models.loading import parse_dtype
from sft.suggest import did_you_mean

if TYPE_CHECKING:
    from sft.config import ModelConfig

CAST_LOGGER = "bitsandbytes.autograd._functions"
"""Logger that reports the dtype of its input at every 8-bit product."""

TRAINER_KEYS = ("offload", "every_n_layers")
"""Arguments of gradient checkpointing that transformers' trainer takes, and not `torch.utils.checkpoint`."""

QUANT_TYPES = ("nf4", "fp4")
STORAGE_TYPES = ("uint8", "bfloat16", "float16", "float32")


class OncePerMessage(logging.Filter):
    """Logging filter that passes each message once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the message is new."""
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


logging.getLogger(CAST_LOGGER).addFilter(OncePerMessage())


def get_quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' configuration for `load_in_4bit` or `load_in_8bit`.

    Products with 4-bit weights (QLoRA, arXiv:2305.14314) are computed in `bnb_4bit_compute_dtype`, or in the model's
    dtype if this is None. 8-bit weights follow LLM.int8 (arXiv:2208.07339).

    Returns:
        The configuration for `from_pretrained`; None if neither option is set.

    Raises:
        ValueError: Both options are set, or the 4-bit type or the storage type does not exist.
    """
    if model_config.load_in_4bit and model_config.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both set: a model is loaded in one of them.")
    if model_config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not model_config.load_in_4bit:
        return None
    if model_config.bnb_4bit_quant_type not in QUANT_TYPES:
        raise ValueError(
            f"bnb_4bit_quant_type={model_config.bnb_4bit_quant_type!r} does not exist: use {' or '.join(QUANT_TYPES)}."
        )
    storage = str(model_config.bnb_4bit_quant_storage or "uint8").removeprefix("torch.")
    if storage not in STORAGE_TYPES:
        hint = did_you_mean(storage, STORAGE_TYPES, otherwise=f"use {', '.join(STORAGE_TYPES)}")
        raise ValueError(f"bnb_4bit_quant_storage={model_config.bnb_4bit_quant_storage!r} does not exist: {hint}.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_quant_type=model_config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=_compute_dtype(model_config),
    )


def _compute_dtype(model_config: ModelConfig) -> torch.dtype:
    wanted = parse_dtype(model_config.bnb_4bit_compute_dtype or model_config.dtype or "float32")
    if isinstance(wanted, torch.dtype):
        return wanted
    # "auto" is the checkpoint's dtype, which is not known yet: use bfloat16 where the device supports it
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def get_kbit_device_map() -> dict[str, int] | None:
    """Return a device map that puts a k-bit model on the accelerator of this process; it can't be moved there later.

    Returns:
        `{"": local process index}`; None without an accelerator.
    """
    if torch.cuda.is_available() or torch.xpu.is_available():
        return {"": PartialState().local_process_index}
    return None


def is_kbit(model: Any) -> bool:
    """Return whether the weights are quantized by bitsandbytes, in 4 or in 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def is_quantized(model: Any) -> bool:
    """Return whether the weights are quantized by any method, so that they can't be trained."""
    return is_kbit(model) or bool(getattr(model, "is_quantized", False))


def needs_kbit_preparation(model: PreTrainedModel) -> bool:
    """Return whether a k-bit base model is not prepared yet: it has half precision parameters or ones with gradients.

    The parameters themselves are checked, so that a model which peft's function prepared counts as prepared.

    Args:
        model: A base model without adapters.
    """
    if not is_kbit(model):
        return False
    return any(parameter.requires_grad or parameter.dtype in HALF_PRECISIONS for parameter in model.parameters())


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Freeze a k-bit base model, convert its norms, embeddings and head to float32, and turn on checkpointing.

    This is peft's function of the same name with one other default: `use_reentrant` is False unless it is given, since
    the reentrant variant finds no gradients where all inputs of a block are frozen.

    Args:
        model: A base model without adapters, loaded in 4 or 8 bits.
        use_gradient_checkpointing: Compute activations again in the backward pass.
        gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint`. `offload` and `every_n_layers`, which only
            transformers knows, are ignored here; the trainer sets them when training begins.

    Returns:
        The same model.
    """
    given = {key: value for key, value in (gradient_checkpointing_kwargs or {}).items() if key not in TRAINER_KEYS}
    kwargs = {"use_reentrant": False, **given}
    return peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=use_gradient_checkpointing,
        gradient_checkpointing_kwargs=kwargs if use_gradient_checkpointing else None,
    )
