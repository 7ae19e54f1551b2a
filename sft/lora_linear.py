"""A frozen linear layer and its LoRA update in one autograd step.

peft computes `base(x) + B(A(x)) * scaling` as five operations, each with a pass of its own over an activation of the
layer's width, forward and backward. Here the update is accumulated into the base's product by the matrix product
itself, in both directions (the order of products that unsloth describes, as a plain autograd function for any device).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from sft.products import back_through_linear, linear


class _LoraProduct(torch.autograd.Function):
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` with W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.t()
        output = linear(flat, weight, bias)
        output.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scaling, ctx.shape = scaling, x.shape
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, down, up, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inner = (grad @ up).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = back_through_linear(grad, weight)
            grad_x = grad_x.addmm_(grad_inner, down).view(ctx.shape)
        grad_down = grad_inner.t() @ flat if ctx.needs_input_grad[3] else None
        # transposed so that the small product reads the wide gradient row by row
        grad_up = (inner.t() @ grad).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_down, grad_up, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Output of a frozen linear layer plus its LoRA update (Hu et al., arXiv:2106.09685).

    Args:
        x: Input, `(..., in)`.
        weight: Frozen, `(out, in)`; gets no gradient.
        bias: Frozen, `(out,)`, or None.
        down: LoRA's A, `(rank, in)`.
        up: LoRA's B, `(out, rank)`.
        scaling: `lora_alpha / rank`, or what the adapter uses.

    Returns:
        `(..., out)`. Keeps `x` and `(..., rank)` for the backward pass, nothing of the output's width.
    """
    output: torch.Tensor = _LoraProduct.apply(x, weight, bias, down, up, scaling)
    return output


def can_fuse(layer: nn.Module) -> bool:
    """Whether `lora_linear` computes the same as this peft layer's own forward.

    That needs one active plain LoRA (no DoRA or other variant, no dropout, no bias of its own) on a frozen, unquantized
    `nn.Linear` of the same dtype.
    """
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    tensors = [p for p in (base.weight, base.bias, down.weight, up.weight) if p is not None]
    return (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and down.bias is None
        and up.bias is None
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and all(type(p) is nn.Parameter and p.dtype == base.weight.dtype for p in tensors)
    )


def _forward(layer: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    weight = layer.base_layer.weight
    # what can change between two calls: the mode, the input, an adapter switched off or merged for a while
    plain = not (args or kwargs or layer.disable_adapters or layer.merged) and layer.training and name in layer.lora_A
    if not plain or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    return lora_linear(
        x,
        weight,
        layer.base_layer.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
    )


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Inside the block, layers that `can_fuse` run through `lora_linear`; the model is as before afterwards.

    Yields:
        How many layers that is.
    """
    layers = [module for module in model.modules() if can_fuse(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward
