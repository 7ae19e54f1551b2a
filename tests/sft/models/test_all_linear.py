"""`all-linear` reaches all linear layers and the experts of every family, neither routers nor the head."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import PreTrainedModel

from sft.config import ModelConfig
from sft.export.merge_in_memory import merge_into_base
from sft.models.adapters import get_peft_config, wrap_adapter
from sft.models.all_linear import bypassed_layers, is_all_linear, linear_targets
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model
from sft.models.weight_kinds import weight_shares
from tests.tiny import tiny_model
from tests.tiny_moe import MOE_FAMILIES, tiny_moe

pytestmark = pytest.mark.numerics

IDS = torch.arange(5, 21)[None]
UNTOUCHED = {"router", "embeddings", "norms", "head"}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def matrix_shares(model: torch.nn.Module) -> dict[str, float]:
    """Return the share that is reached per kind, of kinds with matrices alone."""
    return {share.kind: share.num_reached / share.num_weights for share in weight_shares(model)}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_all_layers_and_experts_are_adapted_and_no_router(family: str) -> None:
    shares = matrix_shares(wrap_adapter(tiny_moe(family), lora()))
    assert {kind: shares[kind] for kind in UNTOUCHED if kind in shares} == dict.fromkeys(UNTOUCHED & set(shares), 0.0)
    for kind in {"attention", "MLP", "experts"} & set(shares):
        assert shares[kind] > 0.95, kind  # biases are not adapted
    assert shares["experts"] > 0


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_matrix_learns_and_the_adapter_loads_and_merges(family: str, tmp_path: Path) -> None:
    adapted = wrap_adapter(tiny_moe(family), lora(init_lora_weights=False))
    adapted.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.abs().sum()] == []
    expected = logits(adapted)
    assert (expected - logits(tiny_moe(family))).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(family), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(merge_into_base(adapted)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma"])
def test_dense_models_are_left_to_peft(family: str) -> None:
    targets = linear_targets(tiny_model(family), lora())
    assert (targets.parameters, targets.routers, targets.left_out) == ((), (), {})
    config = wrap_adapter(tiny_model(family), lora()).peft_config["default"]
    assert config.target_parameters is None


def test_layers_with_the_names_of_former_experts_are_adapted_too() -> None:
    """peft alone adapts neither the dense block nor the shared expert of DeepSeek-V3."""
    for names in ("all-linear", ["q_a_proj", "gate_proj", "up_proj", "down_proj"], r".*_proj"):
        model = wrap_adapter(tiny_moe("deepseek_v3"), lora(target_modules=names)).get_base_model()
        dense, sparse = (layer.mlp for layer in model.model.layers)
        for block in (dense, sparse.shared_experts):
            assert all(hasattr(getattr(block, name), "lora_A") for name in ("gate_proj", "up_proj", "down_proj")), names
        assert hasattr(sparse.experts, "lora_A")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lora(lora_dropout=0.1), "cannot adapt parameters with lora_dropout=0.1; set it to 0.0"),
        (lora(use_dora=True), "cannot adapt parameters with use_dora=True; set it to False"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'; set it to True"),
        (
            IA3Config(target_modules="all-linear", feedforward_modules=[]),
            "adapters of type IA3 cannot change parameters",
        ),
    ],
)
def test_what_all_linear_leaves_out_is_said_with_the_reason(
    config: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sft.models.all_linear"):
        model = wrap_adapter(tiny_moe("gpt_oss"), config)
    assert matrix_shares(model)["experts"] == 0
    (message,) = caplog.messages
    assert "all-linear leaves out experts.down_proj, experts.gate_up_proj, " in message
    assert "% of the weights of GptOssForCausalLM" in message
    assert problem in message


def test_experts_are_left_out_on_request_without_a_warning_of_other_kinds(caplog: pytest.LogCaptureFixture) -> None:
    for asked in ("none", ["none"], []):
        config = get_peft_config(ModelConfig(use_peft=True, lora_target_parameters=asked))
        assert config is not None
        assert matrix_shares(wrap_adapter(tiny_moe("gpt_oss"), config))["experts"] == 0
    assert "name them in target_parameters" in caplog.text


def test_router_is_adapted_when_it_is_named(caplog: pytest.LogCaptureFixture) -> None:
    for family in ("qwen3_moe", "phimoe"):  # a parameter, a linear layer
        with caplog.at_level(logging.INFO, logger="sft.models.all_linear"):
            wrap_adapter(tiny_moe(family), lora())
        advice = caplog.messages[-1].rpartition("give target_parameters=")[2]
        names = [name.strip(" '") for name in advice.strip("[]").split(",")]
        shares = matrix_shares(wrap_adapter(tiny_moe(family), lora(target_parameters=names)))
        assert (shares["router"], shares["experts"], shares["attention"]) == (1, 1, 1)


def test_what_is_excluded_is_neither_adapted_nor_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = wrap_adapter(tiny_moe("qwen2_moe"), lora(exclude_modules=["experts", "shared_expert.up_proj"]))
    shares = matrix_shares(model)
    assert shares["experts"] == 0
    assert shares["MLP"] == pytest.approx(2 / 3)


def test_layers_that_peft_refuses_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> PreTrainedModel:
        return tiny_model("mamba", state_size=4, num_key_value_heads=None)

    model = wrap_adapter(make(), lora())
    assert "out_proj.weight" in caplog.text
    assert "whose kernels read the weight themselves" in caplog.text
    assert 0 < matrix_shares(model)["recurrent"] < 1


def test_all_linear_is_found_in_any_case() -> None:
    assert is_all_linear(lora(target_modules="All-Linear"))
    assert not is_all_linear(lora(target_modules=["q_proj"]))


def test_experts_of_a_base_in_4_bits_are_adapted_and_its_other_layers_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_moe("deepseek_v3", hidden_size=64).save_pretrained(tmp_path)
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    base = load_model(tmp_path, quantization_config=quantization)
    model = wrap_adapter(base, lora(init_lora_weights=False))
    shares = matrix_shares(model)
    assert (shares["attention"], shares["experts"], shares["MLP"]) == (1, 1, 0)
    assert "cannot adapt quantized parameters" in caplog.text
    assert re.search(r"[\d]+ % of the weights of DeepseekV3ForCausalLM are experts, .* GB in float32", caplog.text)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.abs().sum()] == []


def test_base_in_4_bits_whose_layers_bitsandbytes_does_not_know_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("falcon").save_pretrained(tmp_path)
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    wrap_adapter(load_model(tmp_path, quantization_config=quantization), lora())
    assert re.search(
        r"[\d]+ % of the weights of FalconForCausalLM are of layers of class FalconLinear, which bitsandbytes does not "
        r"quantize: they take 0\.0 GB in float32",
        caplog.text,
    )


def test_layers_that_the_model_reads_without_calling_them_are_left_out_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("mamba", state_size=4)
    assert bypassed_layers(model) == {f"backbone.layers.{number}.mixer.dt_proj" for number in range(2)}
    with caplog.at_level(logging.WARNING, logger="sft.models.all_linear"):
        adapted = wrap_adapter(model, lora(init_lora_weights=False))
    assert "all-linear leaves out" in caplog.text
    assert "dt_proj" in caplog.text
    assert "reads their weights without calling them" in caplog.text
    adapted.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert [n for n, weight in adapted.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_experts_without_a_token_are_not_taken_for_bypassed_layers() -> None:
    assert bypassed_layers(tiny_moe("qwen3_moe")) == set()
    assert bypassed_layers(tiny_model("llama")) == set()
