"""Mixes of adapters: sums are exact, random dropping follows the seed, adapters that cannot be mixed are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft.export.merge import MergeReport, merge_adapter
from sft.export.merge_in_memory import AdapterMix
from tests.tiny import tiny_model

pytestmark = pytest.mark.numerics

ROWS = [list(range(5, 45)), [1, 9, 33]]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def save_adapter(folder: Path, config: PeftConfig | None = None, seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    lora = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(tiny_model(), config or lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mix")
    tiny_model().save_pretrained(root / "base")
    save_adapter(root / "a", seed=1)
    save_adapter(root / "b", seed=2)
    save_adapter(root / "wide", seed=3, r=8)
    return {name: root / name for name in ("base", "a", "b", "wide")}


def merged(places: dict[str, Path], folder: Path, *names: str, **options: Any) -> tuple[torch.Tensor, MergeReport]:
    mix = AdapterMix([places[name] for name in names], **options)
    report = merge_adapter(places["base"], mix, folder, ROWS, tolerance=1e-4)
    return load_file(folder / "model.safetensors")[WEIGHT], report


def delta(places: dict[str, Path], name: str) -> torch.Tensor:
    tensors = load_file(places[name] / "adapter_model.safetensors")
    prefix = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
    rank = tensors[f"{prefix}.lora_A.weight"].shape[0]
    scale = PeftConfig.from_pretrained(places[name]).lora_alpha / rank
    return scale * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]


def test_a_sum_of_two_ranks_is_exactly_the_weighted_sum_of_the_updates(places: dict[str, Path], tmp_path: Path) -> None:
    weight, report = merged(places, tmp_path / "m", "a", "wide", weights=[0.7, 0.2])
    base = load_file(places["base"] / "model.safetensors")[WEIGHT]
    torch.testing.assert_close(weight, base + 0.7 * delta(places, "a") + 0.2 * delta(places, "wide"))
    assert report.max_logit_diff <= 1e-4 < report.adapter_effect
    assert report.num_adapted_modules == 14
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype is torch.float32


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "dare_ties"])
def test_every_combination_of_peft_ends_in_a_proven_checkpoint(
    places: dict[str, Path], tmp_path: Path, combination: str
) -> None:
    options = {} if combination == "linear" else {"density": 0.5}
    weight, report = merged(places, tmp_path / "m", "a", "b", weights=[0.5, 0.5], combination=combination, **options)
    exact, _ = merged(places, tmp_path / "exact", "a", "b", weights=[0.5, 0.5])
    assert report.max_logit_diff <= 1e-4 < report.adapter_effect
    assert not torch.allclose(weight, exact, atol=1e-4)


def test_what_is_dropped_at_random_is_dropped_by_seed(places: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": [1.0, 1.0], "combination": "dare_linear", "density": 0.5}
    first, again, other = (
        merged(places, tmp_path / f"m{index}", "a", "b", seed=seed, **options)[0]
        for index, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["a"], {"weights": [1.0]}, "1 adapters and 1 weights: a mix needs at least two adapters"),
        (["a", "b"], {"weights": [1.0]}, "2 adapters and 1 weights"),
        (["a", "b"], {"weights": [1, 1], "combination": "mean"}, "'mean' does not exist: use cat, linear, ties"),
        (["a", "b"], {"weights": [1, 1], "combination": "ties"}, "'ties' needs a density"),
        (["a", "b"], {"weights": [1, 1], "density": 0.5}, "'cat' takes no density"),
        (
            ["a", "b"],
            {"weights": [1, 1], "combination": "ties", "density": 1.5},
            "density is 1.5; it must be more than 0 and at most 1",
        ),
        (["a", "wide"], {"weights": [1, 1], "combination": "linear"}, "combination 'linear' of 2 adapters: .*same r"),
        (["a", "base"], {"weights": [1, 1]}, "holds no adapter"),
    ],
)
def test_invalid_options_of_a_mix_are_refused(
    places: dict[str, Path], tmp_path: Path, names: list[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        merged(places, tmp_path / "m", *names, **options)
    assert not (tmp_path / "m").exists()


def test_other_kinds_and_weights_trained_in_full_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    others = {
        "of type IA3": save_adapter(tmp_path / "ia3", ia3),
        "of type DoRA": save_adapter(tmp_path / "dora", use_dora=True),
        r"trained in full \(base_model.model.lm_head": save_adapter(tmp_path / "whole", modules_to_save=["lm_head"]),
    }
    for words, folder in others.items():
        with pytest.raises(ValueError, match=words):
            merged({**places, "other": folder}, tmp_path / "m", "a", "other", weights=[1.0, 1.0])


def test_an_adapter_of_another_base_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_model(num_hidden_layers=3), LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"belongs to another base: .* have no place"):
        merged({**places, "other": tmp_path / "other"}, tmp_path / "m", "a", "other", weights=[1.0, 1.0])
