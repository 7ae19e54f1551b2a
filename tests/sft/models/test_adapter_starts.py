"""Adapters whose start changes the base: what can't be loaded again as it was trained is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer

from sft.models.adapters import wrap_adapter
from tests.tiny import tiny_model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "orthogonal", "gaussian", "mica", True, False])
def test_start_that_is_repeated_when_the_adapter_is_loaded_is_trained(start: Any) -> None:
    assert wrap_adapter(tiny_model(), lora(init_lora_weights=start)).peft_config["default"].init_lora_weights == start


@pytest.mark.parametrize(
    ("start", "reason"),
    [("pissa_niter_4", "random numbers"), ("corda", "activations"), ("lora_ga", "gradients")],
)
def test_start_that_is_not_repeated_is_refused_with_the_reason(start: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"'{start}' changes the weights of the base.*{reason}.*Use .*'pissa'"):
        wrap_adapter(tiny_model(), lora(init_lora_weights=start))


def test_start_of_a_model_that_was_adapted_before_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny_model(), lora(init_lora_weights="pissa_niter_4"))
    assert wrap_adapter(model, None) is model
    assert "path_initial_model_for_weight_conversion" in caplog.text


def test_unknown_start_that_changes_the_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(self: Any, name: str, start: Any) -> None:
        self.get_base_layer().weight.data *= 0.5

    monkeypatch.setattr(lora_layer.LoraLayer, "reset_lora_parameters", halve)
    with pytest.raises(ValueError, match="'invented' changed the weights of the base, and this start is not known"):
        wrap_adapter(tiny_model(), lora(init_lora_weights="invented"))


def free_norms(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "options", "is_lost"),
    [
        (free_norms, {}, True),
        (free_norms, {"modules_to_save": ["norm", "input_layernorm", "post_attention_layernorm"]}, True),
        (lambda model: None, {"bias": "all"}, False),
        (lambda model: None, {"bias": "lora_only"}, False),
        (lambda model: None, {"modules_to_save": ["norm"], "trainable_token_indices": [3]}, False),
    ],
)
def test_parameters_that_the_saved_adapter_would_not_contain_are_refused(
    change: Callable[[torch.nn.Module], None], options: dict[str, Any], is_lost: bool
) -> None:
    model = get_peft_model(tiny_model("qwen2"), lora(**options))
    change(model)
    if is_lost:
        with pytest.raises(ValueError, match=r"5 parameters of the base are trained beside the adapter \(.*norm"):
            wrap_adapter(model, None)
    else:
        wrap_adapter(model, None)
