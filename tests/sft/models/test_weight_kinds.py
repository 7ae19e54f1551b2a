"""Each weight has a kind, and the shares of the kinds that a training changes are counted."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import nn

from sft.models.adapters import wrap_adapter
from sft.models.weight_kinds import WeightShare, as_percent, weight_shares, weights_of
from tests.tiny import tiny_model
from tests.tiny_moe import MOE_FAMILIES, tiny_moe


def kinds(model: nn.Module) -> dict[str, str]:
    return {str(weight.name): weight.kind for weight in weights_of(model)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gpt_neox", "gemma2", *MOE_FAMILIES])
def test_every_weight_has_a_kind(family: str) -> None:
    model = tiny_moe(family) if family in MOE_FAMILIES else tiny_model(family)
    found = kinds(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert "other" not in found.values()
    assert {"embeddings", "norms"} < set(found.values())
    assert sum(share.num_weights for share in weight_shares(model)) == sum(p.numel() for p in model.parameters())
    assert ({"experts", "router"} <= set(found.values())) is (family in MOE_FAMILIES)


def test_kinds_of_a_mixture_with_linear_attention_and_a_shared_expert() -> None:
    found = kinds(tiny_moe("qwen3_next"))
    first, second = "model.layers.0", "model.layers.1"
    assert {
        f"{first}.linear_attn.out_proj.weight": "recurrent",
        f"{first}.linear_attn.norm.weight": "norms",
        f"{second}.self_attn.q_proj.weight": "attention",
        f"{second}.self_attn.q_norm.weight": "norms",
        f"{first}.mlp.gate.weight": "router",
        f"{first}.mlp.shared_expert_gate.weight": "router",
        f"{first}.mlp.shared_expert.up_proj.weight": "MLP",
        f"{first}.mlp.experts.down_proj": "experts",
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "head",
    }.items() <= found.items()


def test_kinds_of_experts_inside_attention() -> None:
    found = kinds(tiny_moe("jetmoe"))
    layer = "model.layers.0.self_attention"
    assert found[f"{layer}.experts.input_linear.weight"] == "experts"
    assert found[f"{layer}.experts.router.layer.weight"] == "router"
    assert found[f"{layer}.kv_proj.weight"] == "attention"


def test_names_and_kinds_are_the_same_under_an_adapter() -> None:
    for family in ("qwen3_moe", "jetmoe"):
        plain = kinds(tiny_moe(family))
        config = LoraConfig(target_modules="all-linear", modules_to_save=["norm"], trainable_token_indices=[3])
        adapted = wrap_adapter(tiny_moe(family), config)
        found = {weight.name: weight.kind for weight in weights_of(adapted) if weight.name is not None}
        assert found == plain


def test_shares_of_an_adapter_count_what_it_reaches_and_what_is_trained() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["model.norm"], trainable_token_indices=[3, 4])
    model = wrap_adapter(tiny_model(tie_word_embeddings=False), config)
    plain = {share.kind: share.num_weights for share in weight_shares(tiny_model(tie_word_embeddings=False))}
    shares = {share.kind: share for share in weight_shares(model)}
    assert {kind: share.num_weights for kind, share in shares.items()} == plain
    assert shares["attention"] == WeightShare("attention", plain["attention"], 2 * 16 * 16, 2 * 4 * (16 + 16))
    assert shares["embeddings"] == WeightShare("embeddings", plain["embeddings"], 2 * 16, 2 * 16)
    assert (shares["norms"].num_reached, shares["norms"].num_trained) == (16, 16)
    assert shares["MLP"].num_trained == shares["head"].num_reached == 0


def test_all_weights_are_reached_without_an_adapter() -> None:
    for share in weight_shares(tiny_moe("mixtral")):
        assert share.num_weights == share.num_reached == share.num_trained


def test_prompts_are_a_kind_of_their_own() -> None:
    model = wrap_adapter(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    shares = {share.kind: share for share in weight_shares(model)}
    assert (shares["prompt"].num_weights, shares["prompt"].num_trained) == (0, 3 * 16)
    assert shares["attention"].num_reached == 0


def test_shares_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sft.models.adapters"):
        wrap_adapter(tiny_moe("qwen3_moe"), LoraConfig(target_modules="all-linear"))
    assert (
        "weights that training changes: attention 100 %, experts 100 %, router 0 %, embeddings 0 %, norms 0 %, head 0 %"
        in caplog.messages
    )


def test_percentages_are_0_and_100_for_nothing_and_everything_only() -> None:
    shares = [as_percent(part, 1000) for part in (0, 1, 10, 345, 994, 1000)]
    assert shares == ["0 %", "<1 %", "1 %", "34 %", ">99 %", "100 %"]
    assert as_percent(0, 0) == "0 %"


def test_gpt2s_convolutions_are_linear_layers() -> None:
    model = tiny_model("gpt2")
    assert kinds(model)["transformer.h.0.attn.c_attn.weight"] == "attention"
    assert not any(kind == "recurrent" for kind in kinds(model).values())
    assert isinstance(model.transformer.h[0].mlp.c_fc.weight, torch.nn.Parameter)
