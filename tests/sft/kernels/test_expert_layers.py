"""Fused layers compute the same where peft adapts parameters: experts, and layers beside them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from sft.kernels.layers import fused_layers
from sft.kernels.lora import fused_lora
from sft.models.adapters import wrap_adapter
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
IDS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_gradients_are_those_of_plain_layers(family: str) -> None:
    torch.manual_seed(0)
    model = wrap_adapter(tiny_moe(family, **WIDE), LoraConfig(target_modules="all-linear", init_lora_weights=False))

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        return loss.item(), {
            name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad
        }

    expected, gradients = step()
    with fused_lora(model), fused_layers(model) as num_layers:
        assert num_layers > 0
        found, fused = step()
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
