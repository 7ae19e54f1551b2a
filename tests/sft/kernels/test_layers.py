"""Fused norms and feed-forward layers compute the same as the model's own, and are used only if they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sft.kernels import layers as module_under_test
from sft.kernels.layers import fused_layers, gated_silu, linear_layer, rms_norm
from tests.tiny import random_model, tiny_model

pytestmark = pytest.mark.numerics


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of one batch and the gradients of all parameters."""
    ids = torch.arange(24).reshape(2, 12)
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_norm_equals_the_formula_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), plain)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def test_gate_equals_the_formula_and_its_gradients() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(gated_silu(gate, up), nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(gated_silu, (gate, up))


@pytest.mark.parametrize(
    ("family", "num_fused"),
    [("llama", 7), ("qwen3", 11), ("mistral", 7), ("gemma2", 0), ("gpt2", 0), ("opt", 0)],
)
def test_model_with_fused_layers_has_the_same_loss_and_gradients(family: str, num_fused: int) -> None:
    model = random_model(family, None)
    loss, gradients = step(model)
    with fused_layers(model) as found:
        fused_loss, fused_gradients = step(model)
    assert found == num_fused
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_model_is_as_before_afterwards_also_after_an_error() -> None:
    model = random_model("llama", None)
    with pytest.raises(IndexError), fused_layers(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert not any("forward" in vars(module) for module in model.modules())


def test_evaluation_and_half_precision_run_the_layers_own_forward() -> None:
    model = random_model("llama", None)
    ids = torch.arange(12)[None]
    own = model.eval()(input_ids=ids).logits
    with fused_layers(model):
        assert torch.equal(model(input_ids=ids).logits, own)
    half = random_model("llama", None).bfloat16().train()
    with fused_layers(half) as found:
        assert found == 0


def test_layers_with_hooks_or_another_activation_are_not_replaced() -> None:
    model = random_model("llama", None, hidden_act="gelu")
    model.model.norm.register_forward_hook(lambda *_: None)
    with fused_layers(model) as found:
        assert found == 4


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_equals_the_formula_and_its_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,)))
    inputs = (x, weight, shift) if bias else (x, weight)
    torch.testing.assert_close(linear_layer(*inputs), nn.functional.linear(*inputs))
    assert torch.autograd.gradcheck(linear_layer, inputs)


def test_linear_layers_of_a_fully_trained_model_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=128)
    ids = torch.arange(80).reshape(2, 40)
    for taken in (False, True):
        monkeypatch.setattr(module_under_test, "onednn_for_float32", lambda taken=taken: taken)
        model.train().zero_grad()
        with fused_layers(model) as found:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        if not taken:
            plain_found, plain_loss, plain = found, loss.detach(), gradients
    assert found == plain_found + 11  # five in each of two layers, and the head; keys and values are too narrow
    torch.testing.assert_close(loss.detach(), plain_loss, rtol=1e-6, atol=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_autocast_still_chooses_the_precision_of_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "onednn_for_float32", lambda: True)
    layer = nn.Linear(64, 64).train()
    with fused_layers(layer) as found, torch.autocast("cpu", torch.bfloat16):
        assert found == 1
        assert layer(torch.zeros(2, 64)).dtype == torch.bfloat16


class GatedRMSNorm(nn.Module):
    """Shaped like the norms of Qwen3-Next and Mamba 2, whose gate may be left out in some families."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = rms_norm(x, self.weight, self.variance_epsilon)
        return normed if gate is None else normed * nn.functional.silu(gate)


class StrictRMSNorm(GatedRMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, gate)


@pytest.mark.parametrize(("kind", "num_fused"), [(GatedRMSNorm, 1), (StrictRMSNorm, 0)])
def test_norms_with_a_gate_run_their_own_forward(kind: type[GatedRMSNorm], num_fused: int) -> None:
    module = kind().train()
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = module(x, gate)
    with fused_layers(nn.ModuleList([module])) as found:
        assert found == num_fused
        torch.testing.assert_close(module(x, gate), expected)
        torch.testing.assert_close(module(x, gate=gate), expected)
