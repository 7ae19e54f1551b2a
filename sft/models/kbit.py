"""Bases in 4 and 8 bits (bitsandbytes), and what they need before an adapter can be trained on them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import peft
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedModel

from sft.hardware import HALF_PRECISIONS
from sft.models.loading import parse_dtype

if TYPE_CHECKING:
    from sft.config import ModelConfig

CAST_LOGGER = "bitsandbytes.autograd._functions"
TRAINER_KEYS = ("offload", "every_n_layers")
QUANT_TYPES = ("nf4", "fp4")


class OncePerMessage(logging.Filter):
    """Lets each message of a logger through once: bitsandbytes says at every product that it casts the input."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


logging.getLogger(CAST_LOGGER).addFilter(OncePerMessage())


def get_quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """Turn `load_in_4bit` and `load_in_8bit` into bitsandbytes' configuration.

    4-bit weights (QLoRA, arXiv:2305.14314) are multiplied in `bnb_4bit_compute_dtype`; left at None, that is the
    model's own dtype. 8-bit weights follow LLM.int8 (arXiv:2208.07339).

    Returns:
        The configuration for `from_pretrained`, or None when neither is asked for.

    Raises:
        ValueError: Both are asked for, or a 4-bit type that does not exist.
    """
    if model_config.load_in_4bit and model_config.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both set: a base is held in one of them.")
    if model_config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not model_config.load_in_4bit:
        return None
    if model_config.bnb_4bit_quant_type not in QUANT_TYPES:
        raise ValueError(
            f"bnb_4bit_quant_type={model_config.bnb_4bit_quant_type!r} does not exist: use {' or '.join(QUANT_TYPES)}."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=_compute_dtype(model_config),
    )


def _compute_dtype(model_config: ModelConfig) -> torch.dtype:
    wanted = parse_dtype(model_config.bnb_4bit_compute_dtype or model_config.dtype or "float32")
    if isinstance(wanted, torch.dtype):
        return wanted
    # "auto" is the checkpoint's own dtype, which is not known yet: take what the device multiplies fast and safely.
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def get_kbit_device_map() -> dict[str, int] | None:
    """Place a k-bit base whole on this process's own accelerator, since its weights can't be moved there later.

    Returns:
        `{"": local process index}` with an accelerator, None without one.
    """
    if torch.cuda.is_available() or torch.xpu.is_available():
        return {"": PartialState().local_process_index}
    return None


def is_kbit(model: Any) -> bool:
    """Whether bitsandbytes holds the weights, in 4 or in 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def is_quantized(model: Any) -> bool:
    """Whether any quantizer holds the weights, so that they can't be trained themselves."""
    return is_kbit(model) or bool(getattr(model, "is_quantized", False))


def needs_kbit_preparation(model: PreTrainedModel) -> bool:
    """Whether a k-bit base is still as it was loaded: norms in half precision, or weights that take gradients.

    Asked of a base without adapters. It looks at the model and not at a mark, so it sees what peft's own function did.
    """
    if not is_kbit(model):
        return False
    return any(parameter.requires_grad or parameter.dtype in HALF_PRECISIONS for parameter in model.parameters())


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Freeze a k-bit base, hold its norms, embeddings and head in float32, and turn checkpointing on.

    This is peft's function of the same name with one other default: `use_reentrant` is False unless stated, since the
    reentrant variant finds no gradient path where all inputs of a block are frozen.

    Args:
        model: A base without adapters, loaded in 4 or 8 bits.
        use_gradient_checkpointing: Recompute activations in the backward pass.
        gradient_checkpointing_kwargs: As of `torch.utils.checkpoint`; `offload` and `every_n_layers`, which are
            transformers' own, wait for the trainer, which sets them as it begins.

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
