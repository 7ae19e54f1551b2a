"""Every tensor that an adapter carries is merged as peft loads it, or the adapter is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft.export.merge import merge_adapter
from sft.export.merge_in_memory import AdapterMix
from sft.models.loading import load_model
from tests.tiny import random_model

pytestmark = pytest.mark.numerics

ROWS = [list(range(5, 45)), list(range(60, 80)), [7]]
MIXTRAL = {"num_local_experts": 4, "num_key_value_heads": 1}
TASK = {"task_type": "CAUSAL_LM"}
Logits = list[torch.Tensor]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "bias": "none", **TASK, **options})


@torch.no_grad()
def logits_of(model: Any) -> Logits:
    return [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]


def adapted(base: Path, config: Any) -> Any:
    """Return a model whose adapter has moved all that can be trained, as a training does."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def train(folder: Path, config: Any, family: str = "qwen2", **overrides: Any) -> Logits:
    """Save a base and an adapter in a folder, and return the logits of the trained model."""
    random_model(family, None, **overrides).save_pretrained(folder / "base")
    model = adapted(folder / "base", config)
    model.save_pretrained(folder / "adapter")
    return logits_of(model)


def merge(folder: Path) -> Logits:
    """Merge, and return the logits of the checkpoint."""
    report = merge_adapter(folder / "base", folder / "adapter", folder / "merged", ROWS, tolerance=1e-4)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    with_adapter = PeftModel.from_pretrained(load_model(folder / "base"), folder / "adapter").eval()
    found = max(
        float((ours - theirs).abs().max()) for ours, theirs in zip(merged, logits_of(with_adapter), strict=True)
    )
    assert report.max_logit_diff == pytest.approx(found, abs=1e-5)
    return merged


def assert_close(found: Logits, expected: Logits) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


BY_FILE: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "all biases": ("qwen2", {}, lambda: lora(bias="all")),
    "biases of adapted layers": ("qwen2", {}, lambda: lora(bias="lora_only", target_modules=["q_proj", "k_proj"])),
    "biases of norms and of transposed layers": ("gpt2", {}, lambda: lora(bias="all", fan_in_fan_out=True)),
    "biases of modules that are saved": ("gpt2", {}, lambda: lora(bias="all", modules_to_save=["ln_1", "ln_f"])),
    "biases and magnitudes": ("qwen2", {}, lambda: lora(bias="lora_only", use_dora=True)),
    "biases of the matrices and of the layers": ("opt", {}, lambda: lora(lora_bias=True, bias="all")),
    "biases and token rows": ("qwen2", {}, lambda: lora(bias="all", trainable_token_indices=[3, 7, 9])),
    "ranks and factors of single layers": (
        "qwen2",
        {},
        lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, bias="all"),
    ),
    "tied embeddings": (
        "qwen2",
        {"tie_word_embeddings": True},
        lambda: lora(bias="all", target_modules=["q_proj", "embed_tokens"]),
    ),
    "a whole block": ("qwen2", {}, lambda: lora(target_modules=["q_proj"], modules_to_save=["mlp", "norm"])),
    "biases of AdaLoRA": (
        "qwen2",
        {},
        lambda: AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10, bias="all", **TASK),
    ),
    "EVA": ("qwen2", {}, lambda: lora(init_lora_weights="eva", bias="all")),
}


@pytest.mark.parametrize("name", BY_FILE)
def test_what_was_trained_is_merged_file_by_file(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family, overrides, config = BY_FILE[name]
    expected = train(tmp_path, config(), family, **overrides)
    assert_close(merge(tmp_path), expected)
    assert "complete model in memory" not in caplog.text


IN_MEMORY: dict[str, tuple[str, dict[str, Any], Callable[[], Any], str]] = {
    "PiSSA": ("qwen2", {}, lambda: lora(init_lora_weights="pissa", bias="all"), "the start of the adapter, pissa"),
    "PiSSA with magnitudes": ("qwen2", {}, lambda: lora(init_lora_weights="pissa", use_dora=True), "pissa"),
    "OLoRA": ("qwen2", {}, lambda: lora(init_lora_weights="olora"), "the start of the adapter, olora"),
    "KaSA": ("qwen2", {}, lambda: lora(kasa_config=peft.tuners.lora.config.KasaConfig()), "kasa_config"),
    "experts by parameter": (
        "mixtral",
        MIXTRAL,
        lambda: lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        "parameters instead of layers",
    ),
    "experts by the names of their former modules": (
        "mixtral",
        MIXTRAL,
        lambda: lora(target_modules=["w1", "w2", "w3"]),
        "parameters instead of layers",
    ),
    "norms": ("gpt2", {}, lambda: LNTuningConfig(target_modules=["ln_1", "ln_f"], **TASK), "LN_TUNING"),
    "token rows alone": ("qwen2", {}, lambda: TrainableTokensConfig(token_indices=[3, 7], **TASK), "TRAINABLE_TOKENS"),
    "factors, and modules that are saved": (
        "qwen2",
        {},
        lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["norm"], **TASK),
        "IA3",
    ),
    "rotations and biases": (
        "qwen2",
        {},
        lambda: BOFTConfig(target_modules=["q_proj"], boft_block_size=4, bias="boft_only", **TASK),
        "BOFT",
    ),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_what_was_trained_is_merged_in_memory(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family, overrides, config, reason = IN_MEMORY[name]
    expected = train(tmp_path, config(), family, **overrides)
    assert_close(merge(tmp_path), expected)
    assert reason in caplog.text


def change_file(folder: Path, **tensors: torch.Tensor | None) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    changed = {**load_file(file), **{f"base_model.model.{name}": tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "shape", "tied"),
    [
        ("model.norm.weight", (16,), False),
        ("model.embed_tokens.weight", (270, 16), False),
        ("model.embed_tokens.weight", (270, 16), True),
        ("lm_head.weight", (270, 16), True),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", (16, 16), False),
    ],
)
def test_weights_of_the_base_in_the_file_of_an_adapter_are_merged_as_peft_reads_them(
    tmp_path: Path, name: str, shape: tuple[int, ...], tied: bool
) -> None:
    train(tmp_path, lora(), vocab_size=270, tie_word_embeddings=tied)
    before = merge(tmp_path)
    change_file(tmp_path, **{name: torch.full(shape, 0.25)})
    (tmp_path / "merged").rename(tmp_path / "earlier")
    assert float((merge(tmp_path)[0] - before[0]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.0.foo.weight", torch.ones(2), r"1 have no place \(base_model.model.model.layers.0.foo.weight"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(4, 16), r"1 have no place .*up_proj.lora_A"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", None, r"1 of its weights are missing .*q_proj.base_layer"),
    ],
)
def test_adapter_with_a_tensor_too_many_or_too_few_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: str
) -> None:
    train(tmp_path, lora(bias="all", target_modules=["q_proj"]))
    change_file(tmp_path, **{name: tensor})
    with pytest.raises(ValueError, match=words):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_adapter_stored_in_half_precision_is_merged_in_full(tmp_path: Path) -> None:
    train(tmp_path, lora(bias="all", modules_to_save=["norm"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    merge(tmp_path)


def test_start_at_random_is_merged_if_it_was_converted(tmp_path: Path) -> None:
    random_model("qwen2", None).save_pretrained(tmp_path / "base")
    start = "pissa_niter_4"
    model = get_peft_model(load_model(tmp_path / "base"), lora(init_lora_weights=start))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    converted = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    model.eval().save_pretrained(tmp_path / "adapter", **converted)
    assert_close(merge(tmp_path), logits_of(model))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: lora(init_lora_weights="pissa_niter_4"), r"pissa_niter_4'.* starts from random numbers"),
        (lambda: lora(alora_invocation_tokens=[7]), "peft cannot merge this LORA adapter: aLoRA does not support"),
        (lambda: lora(lora_bias=True, target_modules=["o_proj"]), "cannot merge .*the base layer has no bias"),
        (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "repeats layers of the base"),
        (lambda: peft.LilyConfig(target_modules=["q_proj"], r=4, **TASK), "cannot merge this LILY adapter"),
        (lambda: AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **TASK), "ADAPTION_PROMPT .*no merged form"),
    ],
)
def test_adapter_without_a_merged_form_is_refused_by_name(
    tmp_path: Path, config: Callable[[], Any], words: str
) -> None:
    train(tmp_path, config(), "llama", num_key_value_heads=2)
    with pytest.raises(ValueError, match=words):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"use_rslora": True, "lora_alpha": 16}, {"r": 2}),
        ({"use_rslora": True}, {"use_rslora": True, "r": 2}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"exclude_modules": ["q_proj"]}, {"target_modules": r".*layers\.1.*q_proj"}),
        ({"alpha_pattern": {"q_proj": 32}}, {"rank_pattern": {"v_proj": 2}}),
    ],
    ids=str,
)
def test_sum_of_two_adapters_is_the_sum_of_what_each_of_them_adds(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    random_model("qwen2", None).save_pretrained(tmp_path / "base")
    for name, options in (("first", first), ("second", second)):
        adapted(tmp_path / "base", lora(**options)).save_pretrained(tmp_path / name)
    mix = AdapterMix([tmp_path / "first", tmp_path / "second"], [0.7, 0.4])
    merge_adapter(tmp_path / "base", mix, tmp_path / "merged", ROWS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    base = load_model(tmp_path / "base").state_dict()
    alone = [
        PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / name).merge_and_unload().state_dict()
        for name in ("first", "second")
    ]
    for name, weight in base.items():
        expected = weight + 0.7 * (alone[0][name] - weight) + 0.4 * (alone[1][name] - weight)
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=0)


def test_mix_of_an_adapter_that_changes_the_base_is_refused(tmp_path: Path) -> None:
    random_model("qwen2", None).save_pretrained(tmp_path / "base")
    adapted(tmp_path / "base", lora(init_lora_weights="pissa")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa': only adapters that add"):
        AdapterMix([tmp_path / "adapter"] * 2, [1, 1]).check()
