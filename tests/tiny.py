"""Tiny real models and tokenizers, made in-process so that no test needs a network or a hub."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sft.config import SFTConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system What is the capital of France? Paris is the capital of France.",
    '{"intent": "order", "customer": "Ada Lovelace", "city": "London", "items": [{"product": "lamp", "quantity": 2}]}',
    "Hello! How are you today? I would like to order two lamps and a chair, please.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 Question: Answer: ### Instruction: ### Response:",
]


@lru_cache(maxsize=1)
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML, **overrides: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 384 tokens with ChatML tokens; eos is `<|im_end|>`, pad is `<pad>`, no bos is added."""
    kwargs: dict[str, Any] = {
        "tokenizer_object": Tokenizer.from_str(_trained_tokenizer()),
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "pad_token": "<pad>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer = PreTrainedTokenizerFast(**{**kwargs, **overrides})
    tokenizer.chat_template = chat_template
    return tokenizer


FAMILY_OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 2048,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2},
}


def tiny_model(family: str = "llama", vocab_size: int | None = None, **overrides: Any) -> PreTrainedModel:
    """A seeded two-layer model of width 16, fp32, in eval mode; its vocabulary fits `tiny_tokenizer()`."""
    tokenizer = tiny_tokenizer()
    config_kwargs: dict[str, Any] = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CONFIG_MAPPING[family](**{**config_kwargs, **FAMILY_OVERRIDES.get(family, {}), **overrides})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_model(family: str, attention: str | None, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose weights are all moved at random, so that none of its parts hides behind zeros or ones."""
    model = tiny_model(family, **overrides)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def quiet_config(folder: Any, **options: Any) -> SFTConfig:
    """Options of a short training on the CPU that reports to nobody and draws no bar."""
    return SFTConfig(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
