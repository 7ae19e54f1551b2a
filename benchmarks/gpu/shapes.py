"""Shapes of real models, with random weights, and the same models made tiny."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAX_POSITIONS = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with grouped-query attention and SwiGLU.

    Attributes:
        model_type: Type of transformers.
        hidden: Width of the residual stream.
        inner: Width of the MLP.
        layers: Number of layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocabulary: Tokens, as the head computes them.
        tied: Whether head and embeddings are one matrix.
        full_attention_every: 1 = all layers attend; 4 = every fourth does, and the others are gated delta nets.
        delta_key_heads: Heads of queries and keys of the gated delta nets.
        delta_value_heads: Heads of their values.
        delta_head_dim: Width of their heads.
    """

    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    full_attention_every: int = 1
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_head_dim: int = 0

    @property
    def attention_layers(self) -> int:
        """Number of layers with softmax attention."""
        return self.layers // self.full_attention_every

    def config(self) -> Any:
        """Return the configuration of transformers."""
        fields: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        if self.full_attention_every > 1:
            fields |= {
                "linear_num_key_heads": self.delta_key_heads,
                "linear_num_value_heads": self.delta_value_heads,
                "linear_key_head_dim": self.delta_head_dim,
                "linear_value_head_dim": self.delta_head_dim,
                "layer_types": [
                    "full_attention" if (layer + 1) % self.full_attention_every == 0 else "linear_attention"
                    for layer in range(self.layers)
                ],
            }
        return CONFIG_MAPPING[self.model_type](**fields)

    def tiny(self) -> Shape:
        """Return the same kind of model at the size of a test."""
        return replace(
            self,
            hidden=64,
            inner=128,
            layers=2 * self.full_attention_every if self.full_attention_every == 1 else self.full_attention_every,
            heads=4,
            kv_heads=4 if self.kv_heads == self.heads else 2,
            head_dim=16,
            vocabulary=256,
            delta_key_heads=min(2, self.delta_key_heads),
            delta_value_heads=min(4, self.delta_value_heads),
            delta_head_dim=min(16, self.delta_head_dim),
        )


SHAPES = {
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128_256),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152_064),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151_936),
    "smollm2-1.7b": Shape("llama", 2048, 8192, 24, 32, 32, 64, 49_152, tied=True),
    "qwen3.5-9b": Shape("qwen3_5_text", 4096, 12288, 32, 16, 4, 256, 248_320, False, 4, 16, 32, 128),
}
"""The text models as their model cards and configurations state them."""


def random_model(
    shape: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0
) -> PreTrainedModel:
    """Return a model with random weights, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, attn_implementation=attention)


def in_four_bits(model: PreTrainedModel, folder: str, device: str) -> PreTrainedModel:
    """Return a model in nf4, by way of a checkpoint in a folder."""
    model.save_pretrained(folder)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bits, dtype=model.dtype, device_map={"": device}
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbered words; rows are given as token ids, so no text is encoded."""
    words = {f"w{number}": number for number in range(3, min(vocabulary, 1000))}
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=MAX_POSITIONS
    )
