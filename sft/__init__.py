"""Supervised fine-tuning: a trainer, and the parts it is wired from.

Names are imported on first use, so that `import sft` is quick and a part that needs no torch does not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.adapter_mix import AdapterMix
    from sft.adapters import get_peft_config
    from sft.attention import document_layout, probe_isolation
    from sft.chat_formats import clone_chat_template, setup_chat_format
    from sft.collators import DataCollatorForSFT
    from sft.completion_collator import DataCollatorForCompletionOnlyLM
    from sft.config import ModelConfig, SFTConfig
    from sft.constant_length import ConstantLengthDataset
    from sft.evaluation import evaluate_model
    from sft.gptq import quantize_gptq
    from sft.labels import IGNORE_INDEX
    from sft.merge import merge_adapter
    from sft.models import load_model, load_tokenizer
    from sft.packing import pack_dataset, truncate_dataset
    from sft.preview import preview_masks
    from sft.quantization import get_kbit_device_map, get_quantization_config, prepare_model_for_kbit_training
    from sft.trainer import SFTTrainer
    from sft.vision import DataCollatorForVisionLanguageModeling

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
    "AdapterMix": "adapter_mix",
    "ConstantLengthDataset": "constant_length",
    "DataCollatorForCompletionOnlyLM": "completion_collator",
    "DataCollatorForSFT": "collators",
    "DataCollatorForVisionLanguageModeling": "vision",
    "IGNORE_INDEX": "labels",
    "ModelConfig": "config",
    "SFTConfig": "config",
    "SFTTrainer": "trainer",
    "clone_chat_template": "chat_formats",
    "document_layout": "attention",
    "evaluate_model": "evaluation",
    "get_kbit_device_map": "quantization",
    "get_peft_config": "adapters",
    "get_quantization_config": "quantization",
    "load_model": "models",
    "load_tokenizer": "models",
    "merge_adapter": "merge",
    "pack_dataset": "packing",
    "prepare_model_for_kbit_training": "quantization",
    "preview_masks": "preview",
    "probe_isolation": "attention",
    "quantize_gptq": "gptq",
    "setup_chat_format": "chat_formats",
    "truncate_dataset": "packing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sft' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
