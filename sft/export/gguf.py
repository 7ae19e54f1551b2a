"""Write a plain checkpoint as one GGUF file, which llama.cpp and what builds on it run, and prove that it reads back.

Weight matrices are stored in half precision or in blocks of 32 eight-bit values with a scale (`q8_0`), norms and biases
in single precision, as llama.cpp's own converter does it. Tensors are read and written one at a time.

A byte-level BPE tokenizer as llama.cpp's format holds it: tokens, kinds, merges, and the name of its splitter.
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
from sft.models.gguf import load_gguf_tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLIT_PATTERNS = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""Regular expression by which text is split before merging -> llama.cpp's name for it."""

SPECIAL_IDS = ("bos", "eos", "pad", "unk")


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write a tokenizer into a GGUF file that is being made.

    Args:
        writer: Of the file.
        tokenizer: A fast tokenizer of the byte-level BPE kind.
        vocab_size: Rows of the embeddings; what is more than tokens is filled up with unused ones.

    Raises:
        ValueError: Another kind of tokenizer, or one that splits text in a way llama.cpp has no name for here.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = splitter_name(content)
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    kinds = {
        token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        for token in content["added_tokens"]
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
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


def splitter_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer splits text before merging.

    Args:
        content: The tokenizer as its JSON file holds it.

    Raises:
        ValueError: There is none, and a file with a wrong name would give other tokens.
    """
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        kind = "SentencePiece-like BPE" if content["model"]["type"] == "BPE" else content["model"]["type"]
        raise ValueError(f"the tokenizer is of the kind {kind}; GGUF export supports byte-level BPE")
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
        f"the tokenizer splits text by {pattern or kinds}, for which GGUF export knows no name of llama.cpp's; known "
        f"are {', '.join(('gpt-2', 'smollm', *SPLIT_PATTERNS.values()))}"
    )


KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0}

FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
"""`model_type` of transformers -> architecture of llama.cpp."""

MAX_DEVIATION = 0.1
"""Mean difference of logits over their standard deviation: 8 bits stay some 0.01, a layout that is wrong is near 1."""


@dataclass(frozen=True)
class GGUFReport:
    """What was written, and how far it is from the checkpoint when transformers reads it.

    Args:
        precision: f16 or q8_0.
        num_bytes: Size of the file.
        deviation: Mean absolute difference of the logits over their standard deviation.
        max_logit_diff: Largest absolute difference of a logit.
        top_token_agreement: Share of positions with the same most likely token.
        num_positions: Positions compared.
    """

    precision: str
    num_bytes: int
    deviation: float
    max_logit_diff: float
    top_token_agreement: float
    num_positions: int

    def to_dict(self) -> dict[str, float | int | str]:
        """The figures by name."""
        return asdict(self)


def export_gguf(
    model_dir: Path, output_file: Path, precision: str, sample_input_ids: Sequence[Sequence[int]]
) -> GGUFReport:
    """Write a GGUF file, read it back with transformers and compare both models and both tokenizers.

    Args:
        model_dir: Plain checkpoint of a Llama or Qwen2, tokenizer included.
        output_file: File to write; on any failure nothing is left there.
        precision: f16 or q8_0.
        sample_input_ids: Rows of token ids to compare on.

    Raises:
        ValueError: A precision, architecture or tokenizer that is not supported, a weight beyond half precision's
            range, or a file that reads back as something else.
    """
    if precision not in KINDS:
        raise ValueError(f"GGUF precision {precision!r} is not supported, these are: {', '.join(KINDS)}")
    check_exportable(model_dir)
    output_file.parent.mkdir(parents=True, exist_ok=True)
    partial = output_file.with_name(f".{output_file.name}.partial")
    try:
        _write(model_dir, partial, precision)
        _check_tokens(model_dir, partial, sample_input_ids)
        deviation, difference = _read_back(model_dir, partial, sample_input_ids)
        partial.replace(output_file)
    finally:
        partial.unlink(missing_ok=True)
    return GGUFReport(
        precision=precision,
        num_bytes=output_file.stat().st_size,
        deviation=deviation,
        max_logit_diff=difference.largest,
        top_token_agreement=difference.top_token_agreement,
        num_positions=difference.num_positions,
    )


def check_exportable(model_dir: Path) -> None:
    """Refuse what could not be read back, from configuration and tokenizer alone.

    Raises:
        ValueError: Names the value and what is supported.
    """
    config: Any = AutoConfig.from_pretrained(model_dir)
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{model_dir} is of type {config.model_type!r}, GGUF export is supported for {known}")
    rope = config.rope_parameters or {}
    problems = {
        f"scaled rotary positions ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        "biases in its attention": config.model_type == "llama" and config.attention_bias,
        "biases in its MLP": bool(getattr(config, "mlp_bias", False)),
        "sliding attention": bool(getattr(config, "use_sliding_window", False)),
        "heads of another width than hidden_size / num_attention_heads": _head_width(config)
        != config.hidden_size // config.num_attention_heads,
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ValueError(f"{model_dir} has {' and '.join(found)}, which GGUF export does not support")
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    splitter_name(json.loads(tokenizer.backend_tokenizer.to_str()))


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write(model_dir: Path, file: Path, precision: str) -> None:
    config: Any = AutoConfig.from_pretrained(model_dir)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _add_config(writer, config)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, AutoTokenizer.from_pretrained(model_dir), config.vocab_size)
    try:
        with open_tensors(model_dir) as places:
            for name, theirs in _names(config, places):
                shape = places[name].get_slice(name).get_shape()
                kind = _kind(shape, precision)
                stored = shape if kind is not Kind.Q8_0 else list(gguf.quant_shape_to_byte_shape(shape, kind))
                dtype = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.Q8_0: np.uint8}[kind]
                num_bytes = int(np.prod(stored)) * np.dtype(dtype).itemsize
                writer.add_tensor_info(theirs, stored, np.dtype(dtype), num_bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, _ in _names(config, places):
                writer.write_tensor_data(_stored(name, places[name].get_tensor(name), config, precision))
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


def _names(config: Any, places: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every tensor's name here and in the file; a head that is tied to the embeddings is not stored twice."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name in sorted(places):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"the tensor {name} has no place in a GGUF file of a {config.model_type}")
        yield name, theirs


def _kind(shape: Sequence[int], precision: str) -> Kind:
    """Norms and biases stay whole; a row that blocks do not fill is stored in half precision, as llama.cpp does it."""
    if len(shape) == 1:
        return Kind.F32
    kind = KINDS[precision]
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _stored(name: str, tensor: torch.Tensor, config: Any, precision: str) -> np.ndarray[Any, Any]:
    """A tensor as the file holds it; llama.cpp keeps a llama's queries and keys with a head's halves interleaved."""
    tensor = tensor.float()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads:
        tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
    if not tensor.half().isfinite().all():
        raise ValueError(f"{name} holds values that are no numbers or beyond the range of half precision")
    return gguf.quantize(tensor.numpy(), _kind(tensor.shape, precision))


def _check_tokens(model_dir: Path, file: Path, rows: Sequence[Sequence[int]]) -> None:
    """Both tokenizers must give the same tokens for the rows' texts, and the same prompt for a chat."""
    ours: Any = AutoTokenizer.from_pretrained(model_dir)
    theirs: Any = load_gguf_tokenizer(file, ours.model_max_length)
    for text in [PROBE, *(ours.decode(row) for row in rows)]:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise ValueError(f"read back from GGUF, the tokenizer gives other tokens for {text[:80]!r}")
    if (ours.chat_template, ours.eos_token) != (theirs.chat_template, theirs.eos_token):
        raise ValueError("read back from GGUF, the tokenizer has another chat template or end token")


PROBE = "It's 10 pm;  we've 2,345 items\n\n\tÜber naïve 東京 😀 -- don't (ever) x=y_1.\r\n   END"


def _read_back(model_dir: Path, file: Path, rows: Sequence[Sequence[int]]) -> tuple[float, LogitDifference]:
    reference = logits_of(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), rows)
    written = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    difference = compare_logits(reference, logits_of(written, rows))
    deviation = difference.mean / float(torch.cat(reference).std())
    if not deviation <= MAX_DEVIATION:
        raise ValueError(
            f"read back from GGUF, the model computes something else: its logits are off by {deviation:.3f} standard "
            f"deviations, {MAX_DEVIATION} is the limit"
        )
    return deviation, difference
