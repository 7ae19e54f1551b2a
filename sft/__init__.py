"""Supervised fine-tuning: a trainer, and the parts it is wired from.

Names are imported on first use, so that `import sft` is quick and a part that needs no torch does not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.attention.choice import document_layout, probe_isolation
    from sft.batches.collator import DataCollatorForSFT
    from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
    from sft.chat.formats import clone_chat_template, setup_chat_format
    from sft.config import ModelConfig, SFTConfig
    from sft.evaluate.likelihood import evaluate_model
    from sft.export.gptq import quantize_gptq
    from sft.export.merge import merge_adapter
    from sft.export.merge_in_memory import AdapterMix
    from sft.labels import IGNORE_INDEX
    from sft.models.adapters import get_peft_config
    from sft.models.kbit import get_kbit_device_map, get_quantization_config, prepare_model_for_kbit_training
    from sft.models.loading import load_model, load_tokenizer
    from sft.tokens.constant_length import ConstantLengthDataset
    from sft.tokens.packing import pack_dataset, truncate_dataset
    from sft.tokens.preview import preview_masks
    from sft.train.trainer import SFTTrainer
    from sft.vision.collator import DataCollatorForVisionLanguageModeling

__all__ = [
    "IGNORE_INDEX",
    "AdapterMix",
    "ConstantLengthDataset",
    "DataCollatorForCompletionOnlyLM",
    "DataCollatorForSFT",
    "DataCollatorForVisionLanguageModeling",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "clone_chat_template",
    "document_layout",
    "evaluate_model",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "pack_dataset",
    "prepare_model_for_kbit_training",
    "preview_masks",
    "probe_isolation",
    "quantize_gptq",
    "setup_chat_format",
    "truncate_dataset",
]

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
    "document_layout": "attention.choice",
    "evaluate_model": "evaluate.likelihood",
    "get_kbit_device_map": "models.kbit",
    "get_peft_config": "models.adapters",
    "get_quantization_config": "models.kbit",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "merge_adapter": "export.merge",
    "pack_dataset": "tokens.packing",
    "prepare_model_for_kbit_training": "models.kbit",
    "preview_masks": "tokens.preview",
    "probe_isolation": "attention.choice",
    "quantize_gptq": "export.gptq",
    "setup_chat_format": "chat.formats",
    "truncate_dataset": "tokens.packing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sft' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
