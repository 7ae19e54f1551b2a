"""A tiny llama model as a GGUF file, laid out as llama.cpp's converter does it, and as a wheel that holds the file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a tied llama in fp32; llama.cpp keeps queries and keys with the two halves of a head interleaved."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        writer.add_tensor(_gguf_name(name), _interleave(tensor, heads).numpy() if heads else tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(path: Path, member: str, gguf_file: Path) -> str:
    """Write a wheel that pip accepts and that holds the file; returns its SHA-256."""
    distribution, version = path.name.split("-")[:2]
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, member)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in content["added_tokens"]}
    kinds = {True: TokenType.CONTROL, False: TokenType.NORMAL}
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[index in special] for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    width = weight.shape[1]
    return weight.reshape(num_heads, 2, -1, width).swapaxes(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("embed_tokens", "token_embd"),
    ):
        name = name.replace(ours, theirs)
    return "output_norm.weight" if name == "norm.weight" else name
