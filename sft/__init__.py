"""Supervised fine-tuning of causal language models: `SFTTrainer`, its options, and its parts.

Public names are imported on first use: `import sft` is quick, and modules that need no torch do not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.attention.isolation import probe_isolation as probe_isolation
    from sft.batches.collator import DataCollatorForSFT as DataCollatorForSFT
    from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM as DataCollatorForCompletionOnlyLM
    from sft.batches.layout import document_layout as document_layout
    from sft.chat.formats import clone_chat_template as clone_chat_template
    from sft.chat.formats import setup_chat_format as setup_chat_format
    from sft.config import ModelConfig as ModelConfig
    from sft.config import SFTConfig as SFTConfig
    from sft.evaluate.likelihood import evaluate_model as evaluate_model
    from sft.export.gptq import quantize_gptq as quantize_gptq
    from sft.export.merge import merge_adapter as merge_adapter
    from sft.export.merge_in_memory import AdapterMix as AdapterMix
    from sft.labels import IGNORE_INDEX as IGNORE_INDEX
    from sft.models.adapters import get_peft_config as get_peft_config
    from sft.models.checkpoint import load_tokenizer as load_tokenizer
    from sft.models.kbit import get_kbit_device_map as get_kbit_device_map
    from sft.models.kbit import get_quantization_config as get_quantization_config
    from sft.models.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from sft.models.loading import load_model as load_model
    from sft.tokens.constant_length import ConstantLengthDataset as ConstantLengthDataset
    from sft.tokens.packing import pack_dataset as pack_dataset
    from sft.tokens.packing import truncate_dataset as truncate_dataset
    from sft.tokens.preview import preview_masks as preview_masks
    from sft.train.trainer import SFTTrainer as SFTTrainer
    from sft.vision.collator import DataCollatorForVisionLanguageModeling as DataCollatorForVisionLanguageModeling

# Public name -> the module of `sft` that defines it.
_HOMES = {
    "AdapterMix": "export.merge_in_memory",
    "ConstantLengthDataset": "tokens.constant_length",
    "DataCollatorForCompletionOnlyLM": "batches.completion_collator",
    "DataCollatorForSFT": "batches.collator",
    "DataCollatorForVisionLanguageModeling": "vision.collator",
    "IGNORE_INDEX": "labels",
    "ModelConfig": "config",
    "SFTConfig": "config",
    "SFTTrainer": "train.trainer",
    "clone_chat_template": "chat.formats",
    "document_layout": "batches.layout",
    "evaluate_model": "evaluate.likelihood",
    "get_kbit_device_map": "models.kbit",
    "get_peft_config": "models.adapters",
    "get_quantization_config": "models.kbit",
    "load_model": "models.loading",
    "load_tokenizer": "models.checkpoint",
    "merge_adapter": "export.merge",
    "pack_dataset": "tokens.packing",
    "prepare_model_for_kbit_training": "models.kbit",
    "preview_masks": "tokens.preview",
    "probe_isolation": "attention.isolation",
    "quantize_gptq": "export.gptq",
    "setup_chat_format": "chat.formats",
    "truncate_dataset": "tokens.packing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sft' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
