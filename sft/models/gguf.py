"""Turn a GGUF file into a plain checkpoint that every tool loads.

A GGUF file holds quantized blocks, the hyperparameters and the tokenizer of llama.cpp's format. Models that
transformers reads from it stay marked as quantized: they refuse to be saved, and nothing can be trained on them.
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

GGUF_MAGIC = b"GGUF"

SINGLE_DIGIT_PRE_TOKENIZERS = frozenset({"smollm", "command-r", "starcoder", "refact"})
"""llama.cpp's `tokenizer.ggml.pre` names whose merges were learned on text with every digit split off first.

transformers builds a plain byte-level splitter for them, and "a  7" would become other tokens than in pre-training.
"""


def dequantize_gguf(gguf_file: Path, output_dir: Path) -> None:
    """Write the fp32 weights, config, generation config and tokenizer of a GGUF file as a plain folder.

    Args:
        gguf_file: a file of an architecture that transformers reads (llama, qwen2, gemma, ...).
        output_dir: folder to write; it must not exist or be empty, so that no stale file survives beside new ones.

    Raises:
        ValueError: when the file is no GGUF file, or the folder holds something.
    """
    gguf_file, output_dir = Path(gguf_file), Path(output_dir)
    _check_gguf(gguf_file)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"{output_dir} is not empty: dequantize_gguf writes a whole checkpoint into a folder of its own."
        )
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    _save_plain(quantized, output_dir)
    load_gguf_tokenizer(gguf_file, quantized.config.max_position_embeddings).save_pretrained(output_dir)


def _check_gguf(gguf_file: Path) -> None:
    if not gguf_file.is_file():
        raise ValueError(f"{gguf_file} does not exist: dequantize_gguf needs one .gguf file.")
    with gguf_file.open("rb") as stream:
        magic = stream.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ValueError(
            f"{gguf_file} begins with {magic!r} instead of {GGUF_MAGIC!r}: it is no GGUF file, or a broken download."
        )


def _save_plain(quantized: PreTrainedModel, output_dir: Path) -> None:
    """Save the weights under a model built from the cleaned config, which carries no mark of the quantizer."""
    config = _plain_config(quantized.config)
    with torch.device("meta"):  # only the class and its tied weights are needed, no second copy of the weights
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(output_dir, state_dict=_without_tied_head(quantized, config))


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without the quantizer's mark and without the name the file's author gave the model's training run."""
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
    """The tokenizer of a GGUF file, splitting text as llama.cpp would where transformers does not.

    Args:
        gguf_file: The file.
        max_length: Tokens that the model takes.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if _pre_tokenizer_name(gguf_file) in SINGLE_DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # The file states the context length; without it the tokenizer would promise 10^30 tokens.
    tokenizer.model_max_length = max_length
    for key in ("name_or_path", "vocab_file", "is_local", "local_files_only", "added_tokens_decoder"):
        tokenizer.init_kwargs.pop(key, None)  # where it was read from is nobody's business later
    return tokenizer


def _pre_tokenizer_name(gguf_file: Path) -> str:
    from gguf import GGUFReader  # imports slowly, and only this needs it

    field = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())
