"""The fused LoRA layer computes the same as peft's own, and is used only if it does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sft.config import ModelConfig
from sft.kernels.layers import fused_layers
from sft.kernels.lora import LoraWeights, can_fuse, fused_lora, gated_lora_linear, lora_linear
from sft.models.adapters import wrap_adapter
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics


def adapted(**options: Any) -> PeftModel:
    """Return a tiny model in training mode with LoRA on all linear layers; B is random, so that updates are not 0."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model(), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of one batch and the gradients of all trained parameters."""
    ids = torch.arange(24).reshape(2, 12)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_the_plain_formula(bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight, down, up = (torch.randn(s, dtype=torch.float64) for s in ((3, 7), (2, 7), (3, 2)))
    down.requires_grad_()
    up.requires_grad_()
    shift = torch.randn(3, dtype=torch.float64) if bias else None

    def call(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, LoraWeights(weight, shift, down, up, 0.5))

    plain = nn.functional.linear(x, weight, shift) + 0.5 * (x @ down.t() @ up.t())
    torch.testing.assert_close(call(x, down, up), plain)
    assert torch.autograd.gradcheck(call, (x, down, up))


def test_gated_output_and_gradients_equal_the_plain_formula() -> None:
    torch.manual_seed(0)
    gate, x = (torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, down, up = (torch.randn(s, dtype=torch.float64) for s in ((3, 7), (2, 7), (3, 2)))

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        gate, x, down, up = inputs
        return gated_lora_linear(gate, x, LoraWeights(weight, None, down, up, 0.5))

    inner = nn.functional.silu(gate) * x
    plain = inner @ weight.t() + 0.5 * (inner @ down.t() @ up.t())
    inputs = (gate, x, down.requires_grad_(), up.requires_grad_())
    torch.testing.assert_close(call(*inputs), plain)
    assert torch.autograd.gradcheck(call, inputs)


def test_feed_forward_layers_do_not_keep_what_lora_reads() -> None:
    model = adapted()
    loss, gradients = loss_and_gradients(model)
    kept: list[list[torch.Size]] = []
    for contexts in ([fused_lora], [fused_lora, fused_layers]):
        shapes: list[torch.Size] = []
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(model))
            stack.enter_context(saved_tensors_hooks(lambda t, kept=shapes: (kept.append(t.shape), t)[1], lambda t: t))
            fused_loss, fused_gradients = loss_and_gradients(model)
        kept.append(shapes)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    width = model.config.intermediate_size
    plain, fused = (sum(shape.numel() == 24 * width and shape[-1] == width for shape in shapes) for shapes in kept)
    assert fused == 2 * model.config.num_hidden_layers < plain  # gate and up, not their product


def test_model_with_fused_layers_has_the_same_loss_and_gradients() -> None:
    model = adapted()
    loss, gradients = loss_and_gradients(model)
    with fused_lora(model) as num_layers:
        fused_loss, fused_gradients = loss_and_gradients(model)
    assert num_layers == sum(can_fuse(module) for module in model.modules()) > 0
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=1e-6)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_weights_get_no_gradient() -> None:
    model = adapted()
    with fused_lora(model):
        _, gradients = loss_and_gradients(model)
    assert all("lora_" in name for name in gradients)


def test_layers_are_as_before_after_the_block_even_on_errors() -> None:
    model = adapted()
    with pytest.raises(RuntimeError, match="stop"), fused_lora(model):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_adapter_switched_off_inside_the_block_is_off() -> None:
    model = adapted()
    ids = torch.arange(12)[None]
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
        with fused_lora(model):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_compute_something_else_are_left_to_peft(options: dict[str, Any]) -> None:
    with fused_lora(adapted(**options)) as num_layers:
        assert num_layers == 0


def test_trained_or_differently_typed_base_is_left_to_peft() -> None:
    model = adapted()
    layers = [module for module in model.modules() if can_fuse(module)]
    layers[0].base_layer.weight.requires_grad_(True)
    layers[1].base_layer.to(torch.bfloat16)
    assert not can_fuse(layers[0])
    assert not can_fuse(layers[1])
    assert can_fuse(layers[2])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "nested"])
def base_in_4_bits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """Return a tiny 4-bit model, nested quantization or not, that computes in float32 and has LoRA on all layers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    options = ModelConfig(load_in_4bit=True, use_bnb_nested_quant=request.param, dtype="float32")
    model = load_model(folder, dtype="float32", quantization_config=get_quantization_config(options))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return wrap_adapter(model, lora, tiny_tokenizer()).train()


def test_base_in_4_bits_has_the_same_loss_and_gradients(base_in_4_bits: PeftModel) -> None:
    loss, gradients = loss_and_gradients(base_in_4_bits)
    with fused_lora(base_in_4_bits) as num_layers:
        fused_loss, fused_gradients = loss_and_gradients(base_in_4_bits)
    assert num_layers == 14
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=1e-6)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_base_in_4_bits_that_computes_in_another_dtype_is_left_to_peft(base_in_4_bits: PeftModel) -> None:
    layer = next(module for module in base_in_4_bits.modules() if can_fuse(module))
    layer.base_layer.compute_dtype = torch.bfloat16
    assert not can_fuse(layer)
    layer.base_layer.compute_dtype = torch.float32
    assert can_fuse(layer)
