"""Supervised fine-tuning of causal language models: `SFTTrainer`, its options, and its parts.

Public names are imported on first use: `import sft` is quick, and modules that need no torch do not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sft import trl_paths
from sft.log_noise import hide_import_messages

if TYPE_CHECKING:
    from sft.attention.isolation import probe_isolation as probe_isolation
    from sft.batches.collator import DataCollatorForSFT as DataCollatorForSFT
    from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM as DataCollatorForCompletionOnlyLM
    from sft.batches.language_modeling_collator import (
        DataCollatorForLanguageModeling as DataCollatorForLanguageModeling,
    )
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
    from sft.loss.supervised import dft_loss as dft_loss
    from sft.models.adapters import get_peft_config as get_peft_config
    from sft.models.checkpoint import load_tokenizer as load_tokenizer
    from sft.models.kbit import get_kbit_device_map as get_kbit_device_map
    from sft.models.kbit import get_quantization_config as get_quantization_config
    from sft.models.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from sft.models.loading import load_model as load_model
    from sft.scripts.arguments import DatasetConfig as DatasetConfig
    from sft.scripts.arguments import DatasetMixtureConfig as DatasetMixtureConfig
    from sft.scripts.arguments import ScriptArguments as ScriptArguments
    from sft.scripts.chatml_collator import DataCollatorForChatML as DataCollatorForChatML
    from sft.scripts.completions import LogCompletionsCallback as LogCompletionsCallback
    from sft.scripts.conversations import apply_chat_template as apply_chat_template
    from sft.scripts.conversations import is_conversational as is_conversational
    from sft.scripts.conversations import is_conversational_from_value as is_conversational_from_value
    from sft.scripts.conversations import maybe_apply_chat_template as maybe_apply_chat_template
    from sft.scripts.conversations import maybe_convert_to_chatml as maybe_convert_to_chatml
    from sft.scripts.formatting import ChatMlSpecialTokens as ChatMlSpecialTokens
    from sft.scripts.formatting import conversations_formatting_function as conversations_formatting_function
    from sft.scripts.formatting import get_formatting_func_from_dataset as get_formatting_func_from_dataset
    from sft.scripts.formatting import instructions_formatting_function as instructions_formatting_function
    from sft.scripts.mixtures import get_dataset as get_dataset
    from sft.scripts.parser import TrlParser as TrlParser
    from sft.scripts.terminal import RichProgressCallback as RichProgressCallback
    from sft.scripts.terminal import init_zero_verbose as init_zero_verbose
    from sft.tokens.constant_length import ConstantLengthDataset as ConstantLengthDataset
    from sft.tokens.packing import pack_dataset as pack_dataset
    from sft.tokens.packing import truncate_dataset as truncate_dataset
    from sft.tokens.preview import preview_masks as preview_masks
    from sft.train.trainer import SFTTrainer as SFTTrainer
    from sft.vision.collator import DataCollatorForVisionLanguageModeling as DataCollatorForVisionLanguageModeling

# Public name -> the module of `sft` that defines it.
_HOMES = {
    "AdapterMix": "export.merge_in_memory",
    "ChatMlSpecialTokens": "scripts.formatting",
    "ConstantLengthDataset": "tokens.constant_length",
    "DataCollatorForChatML": "scripts.chatml_collator",
    "DataCollatorForCompletionOnlyLM": "batches.completion_collator",
    "DataCollatorForLanguageModeling": "batches.language_modeling_collator",
    "DataCollatorForSFT": "batches.collator",
    "DataCollatorForVisionLanguageModeling": "vision.collator",
    "DatasetConfig": "scripts.arguments",
    "DatasetMixtureConfig": "scripts.arguments",
    "IGNORE_INDEX": "labels",
    "LogCompletionsCallback": "scripts.completions",
    "ModelConfig": "config",
    "RichProgressCallback": "scripts.terminal",
    "SFTConfig": "config",
    "SFTTrainer": "train.trainer",
    "ScriptArguments": "scripts.arguments",
    "TrlParser": "scripts.parser",
    "apply_chat_template": "scripts.conversations",
    "clone_chat_template": "chat.formats",
    "conversations_formatting_function": "scripts.formatting",
    "dft_loss": "loss.supervised",
    "document_layout": "batches.layout",
    "evaluate_model": "evaluate.likelihood",
    "get_dataset": "scripts.mixtures",
    "get_formatting_func_from_dataset": "scripts.formatting",
    "get_kbit_device_map": "models.kbit",
    "get_peft_config": "models.adapters",
    "get_quantization_config": "models.kbit",
    "init_zero_verbose": "scripts.terminal",
    "instructions_formatting_function": "scripts.formatting",
    "is_conversational": "scripts.conversations",
    "is_conversational_from_value": "scripts.conversations",
    "load_model": "models.loading",
    "load_tokenizer": "models.checkpoint",
    "maybe_apply_chat_template": "scripts.conversations",
    "maybe_convert_to_chatml": "scripts.conversations",
    "merge_adapter": "export.merge",
    "pack_dataset": "tokens.packing",
    "prepare_model_for_kbit_training": "models.kbit",
    "preview_masks": "tokens.preview",
    "probe_isolation": "attention.isolation",
    "quantize_gptq": "export.gptq",
    "setup_chat_format": "chat.formats",
    "truncate_dataset": "tokens.packing",
}

__version__: str
"""Version of the installed package, which its git tags decide; "0+unknown" in a folder that is not installed."""
__all__ = sorted(_HOMES)

trl_paths.install()
hide_import_messages()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sft.{_HOMES[name]}"), name)
    if name in trl_paths.PATHS:
        return importlib.import_module(f"sft.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'sft' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("sft-pipeline")
    except metadata.PackageNotFoundError:
        return "0+unknown"
