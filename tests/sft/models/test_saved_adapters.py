"""A saved adapter is loaded under the names that it was saved with, or the load says what is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks.tiny_families import Sizes, tiny_family
from sft.models.saved_adapters import ADAPTER_WEIGHTS, check_resumed, load_adapter

SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

RENAMED_TWICE = {
    "laguna": "model.layers.1.mlp.shared_experts.up_proj",
    "unlimited_ocr": "model.language_model.layers.0.self_attn.q_proj",
}
"""Family whose rules for former names match its own names, too -> a layer to which they apply."""


def base(family: str) -> Any:
    return tiny_family(family, Sizes(), SPECIAL_TOKENS)


def adapted(family: str, seed: int) -> PeftModel:
    layer = RENAMED_TWICE.get(family, "model.layers.1.self_attn.q_proj")
    model = get_peft_model(base(family), LoraConfig(r=3, target_modules=[layer]))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight)
    return model


def lora_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("family", RENAMED_TWICE)
def test_weights_whose_names_are_the_models_own_are_not_renamed(family: str, tmp_path: Path) -> None:
    saved, resumed = adapted(family, seed=1), adapted(family, seed=2)
    saved.save_pretrained(tmp_path)
    expected = lora_weights(saved)
    place = f"base_model.model.{RENAMED_TWICE[family]}"
    assert expected.keys() == {f"{place}.lora_A.default.weight", f"{place}.lora_B.default.weight"}
    loaded = load_adapter(base(family), tmp_path)
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    for found in (lora_weights(loaded), lora_weights(resumed)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    check_resumed(resumed, tmp_path)


def test_weights_with_former_names_are_still_renamed(tmp_path: Path) -> None:
    saved, other = adapted("laguna", seed=1), adapted("laguna", seed=2)
    saved.save_pretrained(tmp_path)
    file = tmp_path / ADAPTER_WEIGHTS
    former = {name.replace("shared_experts", "shared_expert"): weight for name, weight in load_file(file).items()}
    save_file(former, file, {"format": "pt"})
    other.load_adapter(str(tmp_path), "default")
    found = lora_weights(other)
    assert all(torch.equal(found[name], weight) for name, weight in lora_weights(saved).items())


def test_checkpoint_of_another_adapter_is_not_resumed(tmp_path: Path) -> None:
    saved = adapted("llama", seed=1)
    saved.save_pretrained(tmp_path)
    file = tmp_path / ADAPTER_WEIGHTS
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    other = name.replace("q_proj", "some_proj")
    save_file({other if each == name else each: weight for each, weight in load_file(file).items()}, file)
    problem = f"1 of its weights are missing ({name}) and 1 have no place ({other})"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} belongs to another base: {problem}.")):
        check_resumed(saved, tmp_path)


def test_a_model_without_an_adapter_has_nothing_to_check(tmp_path: Path) -> None:
    check_resumed(base("laguna"), tmp_path)
    check_resumed(adapted("laguna", seed=1), tmp_path)
