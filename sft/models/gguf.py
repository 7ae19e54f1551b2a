"""Conversion of a GGUF file to a plain checkpoint folder.

A GGUF file, the format of llama.cpp, contains quantized weights, hyperparameters and a tokenizer. transformers can read
it, but marks the model as quantized, so that it can neither be saved nor trained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.quantization_config import GgufConfig

from sft.models.values import check_values
from sft.untrusted.gguf_files import check_gguf_file
from sft.untrusted.tokenizer_files import PANIC

GGUF_MAGIC = b"GGUF"

SINGLE_DIGIT_PRE_TOKENIZERS = frozenset({"smollm", "command-r", "starcoder", "refact"})
"""Values of `tokenizer.ggml.pre` for tokenizers that split text into single digits before they merge.

transformers builds a plain byte-level splitter for them, so that "a  7" becomes other tokens than in pre-training.
"""


def dequantize_gguf(gguf_file: Path, output_dir: Path) -> None:
    """Write the weights (in float32), config, generation config and tokenizer of a GGUF file as a checkpoint folder.

    Args:
        gguf_file: A file of an architecture that transformers reads (llama, qwen2, gemma, ...).
        output_dir: Folder to write. It must be empty or not exist, so that no other file is in the checkpoint.

    Raises:
        ValueError: The file is not a GGUF file, is damaged or has weights that are not finite, or the folder is not
            empty.
    """
    gguf_file, output_dir = Path(gguf_file), Path(output_dir)
    _check_gguf(gguf_file)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"{output_dir} is not empty: dequantize_gguf writes a complete checkpoint and needs an empty folder."
        )
    try:
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except Exception as error:  # metadata of other types than expected raises errors of any class
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{gguf_file} can't be read as a model: {type(error).__name__}: {reason}") from error
    check_values(quantized, gguf_file)
    _save_plain(quantized, output_dir)
    load_gguf_tokenizer(gguf_file, quantized.config.max_position_embeddings).save_pretrained(output_dir)


def _check_gguf(gguf_file: Path) -> None:
    if not gguf_file.is_file():
        raise ValueError(f"{gguf_file} does not exist: dequantize_gguf needs one .gguf file.")
    with gguf_file.open("rb") as stream:
        magic = stream.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ValueError(
            f"{gguf_file} begins with {magic!r} instead of {GGUF_MAGIC!r}: it is not a GGUF file, or a broken download."
        )
    check_gguf_file(gguf_file)


def _save_plain(quantized: PreTrainedModel, output_dir: Path) -> None:
    """Save the weights through a model built from the cleaned config, which is not marked as quantized."""
    config = _plain_config(quantized.config)
    with torch.device("meta"):  # only its class and tied weights are needed, not another copy of the weights
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(output_dir, state_dict=_without_tied_head(quantized, config))


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a config without the mark of the quantizer and without the name of the file's model."""
    plain = copy.deepcopy(config)
    for mark in ("quantization_config", "_model_name_or_path"):
        if mark in plain.__dict__:
            delattr(plain, mark)
    plain.name_or_path = ""
    plain.dtype = torch.float32
    return plain


def _without_tied_head(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def load_gguf_tokenizer(gguf_file: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a GGUF file, and have it split digits as llama.cpp does.

    Args:
        gguf_file: The file.
        max_length: Longest sequence of the model, in tokens.

    Raises:
        ValueError: The file has no tokenizer that can be read.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    except BaseException as error:  # as for other tokenizers, errors of any class
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the tokenizer in {gguf_file} can't be read: {type(error).__name__}: {reason}") from error
    if _pre_tokenizer_name(gguf_file) in SINGLE_DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # transformers sets no limit (10^30 tokens) for the tokenizer of a GGUF file
    tokenizer.model_max_length = max_length
    for key in ("name_or_path", "vocab_file", "is_local", "local_files_only", "added_tokens_decoder"):
        tokenizer.init_kwargs.pop(key, None)  # they depend on where the file was read from
    return tokenizer


def _pre_tokenizer_name(gguf_file: Path) -> str:
    from gguf import GGUFReader  # slow to import, and needed only here

    field = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())
