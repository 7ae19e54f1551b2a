"""Tiny mixtures of experts of many families, with the same few sizes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests.tiny import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
EXPERTS = {**SIZES, "num_experts": 4, "moe_intermediate_size": 32}
LOCAL = {**SIZES, "num_local_experts": 4}
ROUTED = {
    **SIZES,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **ROUTED,
    "head_dim": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "gpt_oss": {**LOCAL, "sliding_window": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32},
    "deepseek_v3": LATENT,
    "glm4_moe": ROUTED,
    "granitemoe": LOCAL,
    "olmoe": EXPERTS,
    "llama4_text": {**LOCAL, "intermediate_size_mlp": 32},
    "phimoe": LOCAL,
    "jetmoe": {**SIZES, "kv_channels": 16, "num_local_experts": 4},
    "afmoe": {**EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
}
"""Family -> its sizes."""


def tiny_moe(family: str, **overrides: Any) -> PreTrainedModel:
    """A seeded two-layer mixture of experts with four experts, of which two compute a token."""
    return tiny_model(family, **{**MOE_FAMILIES[family], **overrides})
