"""Answers of models with recurrent states are those of each prompt alone, whatever the family does with its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sft.evaluate.generation import generate_batch
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.numerics

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": DELTA,
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "minimax": {**DELTA, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {"num_blocks": 2, "num_heads": 4, "embedding_dim": 32},
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": len(tiny_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "pad_token_id": None,
            **FAMILIES[family],
        }
    )
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


@torch.inference_mode()
def alone(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Continue one prompt greedily by full passes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_each_prompt_alone(family: str) -> None:
    model, tokenizer = make(family), tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in (3, 9, 5, 5)]
    expected = [alone(model, prompt, 6) for prompt in prompts]
    stops = {expected[0][2], tokenizer.eos_token_id}  # the first answer leaves its batch early
    model.generation_config.eos_token_id = sorted(stops)
    answers = generate_batch(model, tokenizer, prompts, 6, batch_size=4)
    for answer, tokens in zip(answers, expected, strict=True):
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        assert (answer.text, answer.stopped) == (tokenizer.decode(tokens[:end]), end < len(tokens))
