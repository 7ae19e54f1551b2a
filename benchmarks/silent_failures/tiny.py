"""Tiny tokenizers, models and chat templates, made in the process: no case needs a network or a hub."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<s>", "<|channel|>", "<|message|>"]
SPECIAL_TOKENS += ["<|start|>", "<|end|>", "<|return|>", "<|tool_call_start|>", "<|tool_call_end|>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system tool What is the capital of France? Paris is the capital of France.",
    'get_weather {"city": "Paris", "unit": null} get_time {"zone": "Europe/London"} <think>\n\n</think>\n\n',
    "### Instruction:\n### Response:\n Question: Answer: 0 1 2 3 4 5 6 7 8 9 10 11 12",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHATML_WITH_MARKERS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with the markers that `assistant_only_loss` of trl needs."""


@lru_cache(maxsize=1)
def _vocabulary() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 8, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    chat_template: str | None = CHATML, *, adds_bos: bool = False, **overrides: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; eos is `<|im_end|>`, pad is `<pad>`.

    Args:
        chat_template: Its chat template.
        adds_bos: Whether it begins each text with its bos, `<s>`.
        overrides: Arguments of `PreTrainedTokenizerFast`, such as `eos_token`.
    """
    backend = Tokenizer.from_str(_vocabulary())
    if adds_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    defaults = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": "<s>" if adds_bos else None}
    arguments = {**defaults, "model_max_length": 2048, "clean_up_tokenization_spaces": False, **overrides}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)
    tokenizer.chat_template = chat_template
    return tokenizer


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba": {"state_size": 8},
    "lfm2": {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "qwen3_next": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "router_aux_loss_coef": 0.0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 2.0},
    "cohere": {"num_key_value_heads": 1, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 1, "logits_scaling": 8.0},
    "phi": {},
    "gpt_oss": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "qwen3_moe": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def make_config(family: str, **overrides: Any) -> Any:
    """Return the configuration of a tiny model: two layers of width 32, with the vocabulary of `make_tokenizer`."""
    tokenizer = make_tokenizer()
    defaults = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CONFIG_MAPPING[family](**{**defaults, **FAMILIES.get(family, {}), **overrides})


def make_model(family: str = "llama", **overrides: Any) -> Any:
    """Return a seeded causal language model in float32; its weights are moved at random, so that each has an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides), dtype=torch.float32).eval()
    return randomize(model)


def randomize(model: Any, scale: float = 0.1) -> Any:
    """Move all weights at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
