"""Fused layers are used only in models whose results they do not change."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sft.kernels.comparison import kind_of, same_results
from sft.kernels.layers import fused_layers
from sft.kernels.lora import can_fuse, fused_lora, nonzero_update
from sft.kernels.proven import find_unproven, replaced_by_fused
from tests.tiny import random_model

pytestmark = pytest.mark.numerics


def adapted(model: Any = None) -> Any:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model or random_model("llama", None), lora).train()


def test_every_layer_of_a_well_known_model_is_proven() -> None:
    model = adapted()
    assert find_unproven(model, lora=True, layers=True) == set()
    with replaced_by_fused(model, lora=True, layers=True):
        assert sum("forward" in vars(module) for module in model.modules()) == 14 + 7


def test_trying_changes_nothing() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    find_unproven(model, lora=True, layers=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


class FlippedRMSNorm(nn.Module):
    """Called like a norm and the same in its forward pass, but with another gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        return 2 * normed.detach() - normed


def test_a_norm_with_another_gradient_keeps_its_own_forward() -> None:
    model = random_model("llama", None)
    model.model.norm = FlippedRMSNorm()
    with fused_layers(model) as found:
        assert found == 6
        assert "forward" not in vars(model.model.norm)


class InPlaceLlama(nn.Module):
    """Adds to the output of a layer in place, as some models do with their projections."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.projection(x)
        output += 1
        output[..., 0] = 0
        return output


def test_outputs_of_fused_layers_may_be_changed_in_place() -> None:
    model = adapted()
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = InPlaceLlama(attention.q_proj)
    assert find_unproven(model, lora=True, layers=True) == set()


class CountedRMSNorm(nn.Module):
    """A norm by itself, which fails in a model when it runs fused: the model reads what its own forward leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * self.scale * self.weight


class Scaled(nn.Module):
    def __init__(self, norm: CountedRMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.scale = torch.zeros(())
        return self.norm(x) * self.norm.scale


def test_a_class_that_changes_the_complete_model_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("llama", None).train()
    model.model.norm = Scaled(CountedRMSNorm())
    with caplog.at_level(logging.WARNING, logger="sft.kernels.proven"):
        assert find_unproven(model, lora=False, layers=True) == {CountedRMSNorm}
    assert "layers of class CountedRMSNorm run as they are: fused, they change what this model computes" in caplog.text
    with replaced_by_fused(model, lora=False, layers=True, left_out={CountedRMSNorm}):
        assert sum("forward" in vars(module) for module in model.modules()) == 6


def test_a_model_that_fails_by_itself_runs_as_it_is() -> None:
    model = random_model("llama", None)
    model.model.norm = nn.Linear(3, 3)
    assert find_unproven(model, lora=False, layers=True)


def test_update_of_lora_is_not_zero_while_layers_are_compared() -> None:
    up = nn.Parameter(torch.zeros(3, 2))
    with nonzero_update(up):
        assert up.abs().min() > 0
    assert torch.equal(up, torch.zeros(3, 2))


def test_one_layer_of_each_kind_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compared = adapted(), []

    def record(*given: Any) -> bool:
        compared.append(given)
        return same_results(*given)

    monkeypatch.setattr("sft.kernels.lora.same_results", record)
    layers = [module for module in model.modules() if can_fuse(module)]
    with fused_lora(model) as found:
        assert found == len(layers) == 14
    assert len(compared) == len({kind_of(layer) for layer in layers}) < 14


@pytest.mark.parametrize("wrong", [lambda x: x * 2, lambda x: 2 * x.detach() - x, lambda x: x.double()])
def test_other_outputs_gradients_or_dtypes_are_not_the_same(wrong: Any) -> None:
    assert same_results(lambda x: x * 1, lambda x: x + 0, torch.randn(2, 3), [])
    assert not same_results(lambda x: x * 1, wrong, torch.randn(2, 3), [])
