"""Export of a plain checkpoint to one GGUF file, the format of llama.cpp, with a comparison of the file read back.

Weight matrices are stored in half precision or in blocks of 32 eight-bit values with a scale (`q8_0`), norms and biases
in single precision, as in llama.cpp's own converter. Tensors are read and written one at a time. The tokenizer, which
must be a byte-level BPE, is stored as tokens, token types, merges and the name of its pre-tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft.export.gptq_format import open_tensors
from sft.export.proof import LogitDifference, compare_logits, logits_of
from sft.folders import partial_file
from sft.models.gguf import load_gguf_tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLIT_PATTERNS = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""Regular expression of the pre-tokenizer -> llama.cpp's name for it."""

SPECIAL_IDS = ("bos", "eos", "pad", "unk")

KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0}

FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
"""`model_type` of transformers -> architecture of llama.cpp."""

MAX_DEVIATION = 0.1
"""Largest accepted mean absolute difference of the logits, divided by their standard deviation.

Rounding to 8 bits causes about 0.01, a wrong tensor layout about 1.
"""

PROBE = "It's 10 pm;  we've 2,345 items\n\n\tÜber naïve 東京 😀 -- don't (ever) x=y_1.\r\n   END"
"""Text on which the tokenizers are compared, besides the texts of the sample rows."""


@dataclass(frozen=True)
class GGUFReport:
    """Size of the file, and its difference from the checkpoint when transformers reads it.

    Args:
        precision: "f16" or "q8_0".
        num_bytes: Size of the file.
        deviation: Mean absolute difference of the logits, divided by their standard deviation.
        max_logit_diff: Largest absolute difference of a logit.
        top_token_agreement: Share of positions with the same most likely token.
        num_positions: Number of positions compared.
    """

    precision: str
    num_bytes: int
    deviation: float
    max_logit_diff: float
    top_token_agreement: float
    num_positions: int

    def to_dict(self) -> dict[str, float | int | str]:
        """Return all fields by name."""
        return asdict(self)


def export_gguf(
    model_dir: Path, output_file: Path, precision: str, sample_input_ids: Sequence[Sequence[int]]
) -> GGUFReport:
    """Write a GGUF file, read it back with transformers, and compare model and tokenizer with those of the checkpoint.

    Args:
        model_dir: Folder of a plain Llama or Qwen2 checkpoint with its tokenizer.
        output_file: File to write. On any failure it is left as it was.
        precision: "f16" or "q8_0".
        sample_input_ids: Rows of token ids to compare on, `(num_rows, length)`, ragged.

    Raises:
        ValueError: Precision, architecture or tokenizer is not supported, a weight is beyond the range of half
            precision, or the file reads back as a different model or tokenizer.
    """
    if precision not in KINDS:
        raise ValueError(f"GGUF precision {precision!r} is not supported: use {', '.join(KINDS)}")
    check_exportable(model_dir)
    output_file.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(output_file) as partial:
        _write_file(model_dir, partial, precision)
        _check_tokens(model_dir, partial, sample_input_ids)
        deviation, difference = _read_back(model_dir, partial, sample_input_ids)
    return GGUFReport(
        precision=precision,
        num_bytes=output_file.stat().st_size,
        deviation=deviation,
        max_logit_diff=difference.largest,
        top_token_agreement=difference.top_token_agreement,
        num_positions=difference.num_positions,
    )


def check_exportable(model_dir: Path) -> None:
    """Check from configuration and tokenizer alone that a checkpoint can be exported and read back.

    Raises:
        ValueError: It cannot; the message names the value and what is supported.
    """
    config: Any = AutoConfig.from_pretrained(model_dir)
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{model_dir} is of type {config.model_type!r}, but GGUF export supports {known}")
    rope = config.rope_parameters or {}
    problems = {
        f"scaled rotary positions ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        "biases in its attention": config.model_type == "llama" and config.attention_bias,
        "biases in its MLP": bool(getattr(config, "mlp_bias", False)),
        "sliding window attention": bool(getattr(config, "use_sliding_window", False)),
        "heads whose width is not hidden_size / num_attention_heads": _head_width(config)
        != config.hidden_size // config.num_attention_heads,
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ValueError(f"{model_dir} has {' and '.join(found)}, which GGUF export does not support")
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str()))


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.

    Args:
        content: Content of the tokenizer's JSON file.

    Raises:
        ValueError: No name is known; with a wrong one, the file would produce different tokens.
    """
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        kind = "SentencePiece-like BPE" if content["model"]["type"] == "BPE" else content["model"]["type"]
        raise ValueError(f"the tokenizer is a {kind}, but GGUF export supports byte-level BPE only")
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern in SPLIT_PATTERNS:
        return SPLIT_PATTERNS[pattern]
    raise ValueError(
        f"the tokenizer splits text by {pattern or kinds}, for which GGUF export has no pre-tokenizer name of "
        f"llama.cpp; supported: {', '.join(('gpt-2', 'smollm', *SPLIT_PATTERNS.values()))}"
    )


def _write_file(model_dir: Path, file: Path, precision: str) -> None:
    config: Any = AutoConfig.from_pretrained(model_dir)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _add_config(writer, config)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, AutoTokenizer.from_pretrained(model_dir), config.vocab_size)
    try:
        with open_tensors(model_dir) as places:
            for name, gguf_name in _tensor_names(config, places):
                shape = places[name].get_slice(name).get_shape()
                kind = _stored_type(shape, precision)
                stored = shape if kind is not Kind.Q8_0 else list(gguf.quant_shape_to_byte_shape(shape, kind))
                dtype = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.Q8_0: np.uint8}[kind]
                num_bytes = int(np.prod(stored)) * np.dtype(dtype).itemsize
                writer.add_tensor_info(gguf_name, stored, np.dtype(dtype), num_bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, _ in _tensor_names(config, places):
                writer.write_tensor_data(_stored_values(name, places[name].get_tensor(name), config, precision))
    finally:
        writer.close()


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name(config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write a tokenizer to an open GGUF file.

    Args:
        writer: Writer of the file.
        tokenizer: Fast byte-level BPE tokenizer.
        vocab_size: Number of rows of the embeddings. Rows without a token are stored as unused tokens.

    Raises:
        ValueError: The tokenizer is not supported, see `pre_tokenizer_name`.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = pre_tokenizer_name(content)
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    kinds = {
        token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        for token in content["added_tokens"]
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(
        [kinds.get(index, TokenType.NORMAL if index in texts else TokenType.UNUSED) for index in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    for name in SPECIAL_IDS:
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begins = tokenizer("x")["input_ids"][:1]
    writer.add_add_bos_token(begins == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensor_names(config: Any, places: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of each tensor in the checkpoint and in the file; a head tied to the embeddings is skipped."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name in sorted(places):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"the tensor {name} has no counterpart in a GGUF file of type {config.model_type}")
        yield name, gguf_name


def _stored_type(shape: Sequence[int], precision: str) -> Kind:
    """Return the data type of a tensor, as llama.cpp chooses it.

    Norms and biases stay in single precision. Rows that are not a multiple of the block size are stored in half
    precision.
    """
    if len(shape) == 1:
        return Kind.F32
    kind = KINDS[precision]
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _stored_values(name: str, tensor: torch.Tensor, config: Any, precision: str) -> np.ndarray[Any, Any]:
    """Return a tensor as it is stored; for Llama, llama.cpp interleaves the two halves of each query and key head."""
    tensor = tensor.float()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads:
        tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
    if not tensor.half().isfinite().all():
        raise ValueError(f"{name} contains values that are NaN or beyond the range of half precision")
    return gguf.quantize(tensor.numpy(), _stored_type(tensor.shape, precision))


def _check_tokens(model_dir: Path, file: Path, rows: Sequence[Sequence[int]]) -> None:
    """Check that the tokenizer in the file gives the same tokens, and has the same chat template and eos token."""
    ours: Any = AutoTokenizer.from_pretrained(model_dir)
    theirs: Any = load_gguf_tokenizer(file, ours.model_max_length)
    for text in [PROBE, *(ours.decode(row) for row in rows)]:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise ValueError(f"read back from GGUF, the tokenizer gives different tokens for {text[:80]!r}")
    if (ours.chat_template, ours.eos_token) != (theirs.chat_template, theirs.eos_token):
        raise ValueError("read back from GGUF, the tokenizer has a different chat template or eos token")


def _read_back(model_dir: Path, file: Path, rows: Sequence[Sequence[int]]) -> tuple[float, LogitDifference]:
    reference = logits_of(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), rows)
    written = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    difference = compare_logits(reference, logits_of(written, rows))
    deviation = difference.mean / float(torch.cat(reference).std())
    if not deviation <= MAX_DEVIATION:
        raise ValueError(
            f"read back from GGUF, the model differs from the checkpoint: the logits differ by {deviation:.3f} "
            f"standard deviations, {MAX_DEVIATION} is the limit"
        )
    return deviation, difference
