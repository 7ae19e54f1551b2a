"""Tiny models of all families: the causal language models of transformers, and vision-language models for text rows.

A family's own default configuration is made small by the names of its fields. `SIZES_OF` maps names of fields to sizes,
and `SPECIAL` has the few families whose fields depend on each other. Of layers that differ
(`layer_types` and other lists with one entry per layer), the first of every kind is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

IMAGES = " with images"
"""End of the name of a family whose vision-language model is meant, where its type has a model for text alone, too."""

MOST_PARAMETERS = 20_000_000
"""Number of parameters above which a model is not tiny, and is not made."""

NUM_RESERVED = 40
"""Last token ids, which families use for images and other media; documents do not contain them."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of tiny models. The width is `heads * head_dim`.

    Attributes:
        heads: Attention heads.
        kv_heads: Heads of keys and values; divides `heads`.
        head_dim: Width of a head; a multiple of 4, since rotary embeddings may turn a quarter of it.
        intermediate: Width of feed-forward layers; a multiple of 4, which torch's grouped products need.
        layers: Number of layers, at least 2; there are more where a family has more kinds of layers.
        experts: Experts of a mixture; a multiple of 2, of which 2 are used per token.
        vocab: Tokens.
        window: Tokens that windowed attention sees, and chunk size of recurrent layers.
        positions: Number of positions of learned position embeddings.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 44
    layers: int = 2
    experts: int = 4
    vocab: int = 421
    window: int = 5
    positions: int = 128

    def __post_init__(self) -> None:
        multiples = (("heads", self.kv_heads), ("head_dim", 4), ("intermediate", 4), ("experts", 2))
        for name, divisor in multiples:
            if getattr(self, name) % divisor:
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of {divisor}")
        if self.layers < 2:
            raise ValueError(f"layers={self.layers} must be at least 2")

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.heads * self.head_dim


Rule = Callable[[Sizes], Any]


def _group(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


SIZES_OF: dict[str, Rule] = {
    **_group(
        lambda s: s.width,
        """hidden_size d_model n_embd emb_dim dim embed_dim embedding_size word_embed_proj_dim input_embedding_size
        output_embedding_size lru_width linear_attn_hidden_size out_hidden_size projection_dim text_hidden_size
        backbone_hidden_size projector_hidden_size moe_hidden_size image_token_embed_dim hidden_size_global
        adapter_in_dim adapter_out_dim adapter_input_size encoder_hidden_size""",
    ),
    **_group(
        lambda s: s.heads,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads""",
    ),
    **_group(
        lambda s: s.kv_heads,
        "num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads num_global_key_value_heads",
    ),
    **_group(
        lambda s: s.head_dim,
        """head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim global_head_dim kv_channels
        linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_size dim_head mamba_head_dim
        mamba_d_head d_kv query_pre_attn_scalar d_rel""",
    ),
    **_group(
        lambda s: s.intermediate,
        """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim moe_intermediate_size d_inner dim_ff dff n_inner
        shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size ffn_hidden_size
        expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size shared_experts_intermediate_size
        feed_forward_size expert_intermediate_size mlp_dim share_expert_dim""",
    ),
    **_group(
        lambda s: s.layers,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth""",
    ),
    **_group(
        lambda s: s.experts,
        "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num",
    ),
    **_group(
        lambda s: s.vocab,
        """vocab_size vocab_size_per_layer_input unpadded_vocab_size shape_vocab_size pronunciation_vocab_size
        encoder_hash_byte_group_vocab""",
    ),
    **_group(
        lambda s: s.window,
        """sliding_window sliding_window_size attention_window_size attention_chunk_size chunk_size mamba_chunk_size
        window_size local_attention keep_window_size block_size index_topk rel_extent""",
    ),
    **_group(
        lambda s: s.positions,
        """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length
        original_max_position_embeddings""",
    ),
    # layers of recurrent models are twice as wide as their hidden states
    **_group(lambda s: 2 * s.heads, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_group(lambda s: 2 * s.width, "mamba_d_ssm"),
    **_group(lambda s: s.head_dim // 2, "rotary_dim"),
    **_group(
        lambda s: 2,
        """num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts n_group num_expert_group heads_per_ngram o_groups
        num_codebooks patch_size index_topk_blocks spatial_merge_size""",
    ),
    **_group(lambda s: 1, "topk_group first_k_dense_replace n_groups mamba_n_groups"),
    **_group(
        lambda s: 8,
        """kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank adapter_rank laurel_rank hc_lowrank state_size
        mamba_d_state ssm_state_size mamba_dt_rank time_step_rank hidden_size_per_layer_input router_hidden_size
        pronunciation_embed_dim shape_embed_dim num_buckets prompt_length image_size max_image_size min_image_size
        max_img_size num_mel_bins max_source_positions""",
    ),
    # scores of fewer heads are often 0 for several tokens, and which of equal ones are chosen is arbitrary
    **_group(lambda s: 16, "index_n_heads indexer_n_heads"),
    **_group(lambda s: 32, "base_channels latent_channels"),
}
"""Name of a field -> its size. Only fields that have a number by default are set."""

NO_DROPOUT = ("dropout", "pdrop", "drop_path", "layerdrop", "jitter", "label_noise")
"""Parts of the names of fields that would make training random."""

MROPE = """cohere_compass_text ernie4_5_vl_moe_text glm46v_text glm4v_text glm4v_moe_text glm_ocr_text paddleocr_vl_text
    qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text"""
"""Families whose rotary embeddings have sections for time, height and width, whose sizes depend on the head's."""


def _mrope(sizes: Sizes) -> dict[str, Any]:
    total = sizes.head_dim // 2
    section = [total // 3, total // 3, total - 2 * (total // 3)]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}}


SPECIAL: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    **dict.fromkeys(MROPE.split(), _mrope),
    "bamba": lambda s: {"attn_layer_indices": [1]},
    "blt": lambda s: {"encoder_hash_byte_group_vocab": s.vocab},
    "chameleon": lambda s: {"vocabulary_map": {"<image>": s.vocab - 1}},
    "codegen": lambda s: {"n_head": 4, "n_embd": 4 * s.head_dim},
    "cohere_compass_text": lambda s: {"rope_parameters": {"full_attention": _mrope(s)["rope_parameters"]}},
    "dbrx": lambda s: {
        "attn_config": {"kv_n_heads": s.kv_heads, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": s.intermediate, "moe_num_experts": s.experts, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": lambda s: {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "deepseek_v2": lambda s: {"num_experts_per_tok": 2},
    "diffllama": lambda s: {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 4 * s.head_dim},
    "diffusion_gemma_text": lambda s: {
        "num_experts": s.experts,
        "top_k_experts": 2,
        "moe_intermediate_size": s.intermediate,
    },
    "dots1": lambda s: {"n_routed_experts": s.experts, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": lambda s: {
        "per_layer_config": {
            layer: {"num_attention_heads": s.heads, "num_key_value_heads": s.heads, "q_lora_rank": 8, "kv_lora_rank": 8}
            for layer in range(3)
        },
        "head_dim": 2 * s.head_dim,
    },
    "emu3": lambda s: {"vocabulary_map": {"<image>": s.vocab - 1}},
    "gemma3n_text": lambda s: {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": s.intermediate,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm4v_moe_text": lambda s: {"rope_parameters": {**_mrope(s)["rope_parameters"], "partial_rotary_factor": 1.0}},
    "glm5_next_text": lambda s: {"index_kpool": 2, "index_topk": 4},
    "granite4_vision": lambda s: {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
    },
    "granitemoehybrid": lambda s: {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_vl_text": lambda s: _mrope(s),
    "jamba": lambda s: {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": lambda s: {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": lambda s: {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "llama4_vision_model": lambda s: {
        "projector_input_dim": s.width,
        "projector_output_dim": s.width,
        "vision_output_dim": s.width,
    },
    "mamba2": lambda s: {"num_heads": 2 * s.heads},
    "mistral4": lambda s: {"head_dim": 2 * s.head_dim},
    "molmo2": lambda s: {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark_audio": lambda s: {"hidden_sizes": (8, 16, 16, 16), "num_hidden_layers": 4},
    "nemotron_h_omni": lambda s: {"vision_config": {"video_temporal_patch_size": 2}, "video_temporal_patch_size": 2},
    "qwen4_exp_text": lambda s: {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": s.head_dim,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": lambda s: {"num_hidden_layers": 3},
    "reformer": lambda s: {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "stablelm": lambda s: {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "step3p5": lambda s: {"sliding_window": s.window, "swiglu_limits": None, "swiglu_limits_shared": None},
    "unlimited_ocr_text": lambda s: {"num_key_value_heads": s.heads},
    # its own code takes widths of queries, keys and values that are multiples of 64
    "xlstm": lambda s: {"hidden_size": 128, "num_heads": 4},
    "xmod": lambda s: {"default_language": "en_XX"},
    "zamba": lambda s: {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "num_key_value_heads": s.heads,
        "attention_hidden_size": 2 * s.width,
        "attention_head_dim": 2 * s.head_dim,
    },
    "zamba2": lambda s: {"num_key_value_heads": s.heads},
}
"""Type of a configuration -> fields that can't be set by their names alone; a field without number by default, too."""


_DRAFTS = "it drafts for another model, whose hidden states, keys and values it is given instead of token ids"
UNBUILDABLE = {
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "shieldgemma2": "it classifies images, and transformers can't read the language model in it from a checkpoint",
}
"""Family -> why it is not a language model that takes rows of tokens, where its own error does not say it."""


def families() -> dict[str, type]:
    """Return all families: the name of each, and the auto class that makes its model.

    A name is the type of the configuration. Where transformers has one model of a type for text and another one for
    text and images, the second one's name ends in `IMAGES`.
    """
    found: dict[str, type] = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    for model_type, class_name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if model_type not in found:
            found[model_type] = AutoModelForImageTextToText
        elif MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] != class_name:
            found[model_type + IMAGES] = AutoModelForImageTextToText
    return found


def tiny_config(family: str, sizes: Sizes, special_tokens: Mapping[str, int]) -> PreTrainedConfig:
    """Return the configuration of a tiny model.

    Args:
        family: Name as `families` returns it.
        sizes: Of the model.
        special_tokens: `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """
    model_type = family.removesuffix(IMAGES)
    default = CONFIG_MAPPING[model_type]()
    return CONFIG_MAPPING[model_type](**_small_fields(default, sizes, special_tokens))


def _small_fields(config: PreTrainedConfig, sizes: Sizes, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a configuration that get another value, those of inner configurations included."""
    special = SPECIAL.get(config.model_type, lambda sizes: {})(sizes)
    kept = _kept_layers(config, sizes)
    fields: dict[str, Any] = {}
    next_reserved = sizes.vocab
    aliases: dict[str, list[str]] = {}
    for alias, name in config.attribute_map.items():
        aliases.setdefault(name, []).append(alias)
    for name, value in _own_fields(config):
        if isinstance(value, PreTrainedConfig):
            fields[name] = {"model_type": value.model_type, **_small_fields(value, sizes, special_tokens)}
        elif name in special_tokens:
            fields[name] = special_tokens[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            next_reserved -= 1
            fields[name] = next_reserved
        elif any(part in name for part in NO_DROPOUT) and isinstance(value, float):
            fields[name] = 0.0
        elif _is_per_layer(value, config) and kept:
            kinds = [value[index] for index in kept]
            if _has_layer_numbers(value):
                kinds = [kept.index(number) if number in kept else place for place, number in enumerate(kinds)]
            fields[name] = type(value)(kinds)
        elif name in ("head_dim", "num_key_value_heads") and value is None:
            fields[name] = SIZES_OF[name](sizes)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            known = [each for each in (name, *aliases.get(name, ())) if each in SIZES_OF]
            if known:
                fields[name] = SIZES_OF[known[0]](sizes) if value > 1 else value
        elif isinstance(value, dict) and "rope_type" in str(value):
            fields[name] = _small_rope(value, sizes)
    if "kv_lora_rank" in vars(config) and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = sizes.heads  # latent attention has keys for every head
    if kept:
        fields["num_hidden_layers"] = len(kept)
    if getattr(config, "is_decoder", None) is False:
        fields["is_decoder"] = True
    if getattr(config, "output_router_logits", False):
        fields["output_router_logits"] = False
    for name, value in special.items():
        together = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = {**fields[name], **value} if together else value
    return fields


def _own_fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if not name.startswith("_") and name not in ("transformers_version", "architectures", "dtype"):
            yield name, value


def _is_per_layer(value: Any, config: PreTrainedConfig) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == getattr(config, "num_hidden_layers", None)


def _has_layer_numbers(per_layer: Sequence[Any]) -> bool:
    """Return whether a list with an entry per layer has numbers of layers, and not 0 and 1 for no and yes."""
    return all(type(value) is int for value in per_layer) and 1 < max(per_layer) < len(per_layer)


def _kept_layers(config: PreTrainedConfig, sizes: Sizes) -> list[int]:
    """Return the layers to keep of a configuration with lists that have an entry per layer: the first of every kind."""
    lists = [value for _, value in _own_fields(config) if _is_per_layer(value, config)]
    lists = [value for value in lists if not _has_layer_numbers(value)]
    if not lists or len(lists[0]) < 3:
        return []
    kinds = [str(kind) for kind in zip(*lists, strict=True)]
    kept = {kinds.index(kind) for kind in kinds}
    rest = (index for index in range(len(kinds)) if index not in kept)
    while len(kept) < min(sizes.layers, len(kinds)):
        kept.add(next(rest))
    return sorted(kept)


def _small_rope(rope: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the parameters of rotary embeddings for a smaller head, where they name parts of it."""
    small = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _small_rope(value, sizes)
        elif name == "mrope_section":
            small[name] = _sections(value, int(sizes.head_dim * rope.get("partial_rotary_factor", 1.0)) // 2)
        elif name == "original_max_position_embeddings":
            small[name] = sizes.positions
        else:
            small[name] = value
    return small


def _sections(given: list[int], total: int) -> list[int]:
    """Divide `total` in about the same shares as `given`."""
    ends = [round(total * sum(given[: place + 1]) / sum(given)) for place in range(len(given))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def tiny_family(
    family: str,
    sizes: Sizes,
    special_tokens: Mapping[str, int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return a tiny model whose weights are all moved at random, so that none of its parts hides behind zeros or ones.

    Args:
        family: Name as `families` returns it.
        sizes: Of the model.
        special_tokens: `bos_token_id`, `eos_token_id` and `pad_token_id`.
        seed: Of the weights.
        dtype: Of the weights; their values are the same in float32 and float64.

    Raises:
        ValueError: The model is not tiny, because a field of its configuration is not in `SIZES_OF`; the message names
            the largest weights.
    """
    config = tiny_config(family, sizes, special_tokens)
    auto_class: Any = families()[family]
    if auto_class is AutoModelForImageTextToText and config.is_encoder_decoder:
        raise ValueError("it is an encoder with a decoder, which is not a causal language model")
    with torch.device("meta"):
        outline = auto_class.from_config(config)
    large = sorted(((weight.numel(), name) for name, weight in outline.named_parameters()), reverse=True)
    if sum(number for number, _ in large) > MOST_PARAMETERS:
        raise ValueError(f"{sum(number for number, _ in large):,} parameters, the largest {large[:4]}")
    torch.manual_seed(seed)
    model = auto_class.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * min(0.1, 1 / math.sqrt(sizes.width)))
    return model.to(dtype).eval()
