"""A frozen linear layer and its LoRA update in one autograd step.

peft computes `base(x) + B(A(x)) * scaling` as five operations, each with a pass of its own over an activation of the
layer's width, forward and backward. Here the update is accumulated into the base's product by the matrix product
itself, in both directions (the order of products that unsloth describes, as a plain autograd function for any device).
A base in 4 bits is unpacked for each product and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from sft.products import back_through_linear, linear


class _LoraProduct(torch.autograd.Function):
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` with W and bias frozen, W perhaps in 4 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        packing: Any,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.t()
        output = linear(flat, _unpacked(weight, packing, x.dtype), bias)
        output.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scaling, ctx.shape, ctx.packing = scaling, x.shape, packing
        return output.view(*x.shape[:-1], up.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, down, up, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, up.shape[0])
        grad_inner = (grad @ up).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = back_through_linear(grad, _unpacked(weight, ctx.packing, grad.dtype))
            grad_x = grad_x.addmm_(grad_inner, down).view(ctx.shape)
        grad_down = grad_inner.t() @ flat if ctx.needs_input_grad[3] else None
        # transposed so that the small product reads the wide gradient row by row
        grad_up = (inner.t() @ grad).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_down, grad_up, None, None


def _unpacked(weight: torch.Tensor, packing: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight as `(out, in)`; bitsandbytes' `QuantState` says how it is packed, None that it is not."""
    if packing is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense: torch.Tensor = dequantize_4bit(weight, packing).to(dtype)
    return dense


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    packing: Any = None,
) -> torch.Tensor:
    """Output of a frozen linear layer plus its LoRA update (Hu et al., arXiv:2106.09685).

    Args:
        x: Input, `(..., in)`.
        weight: Frozen, `(out, in)`, or packed; gets no gradient.
        bias: Frozen, `(out,)`, or None.
        down: LoRA's A, `(rank, in)`.
        up: LoRA's B, `(out, rank)`.
        scaling: `lora_alpha / rank`, or what the adapter uses.
        packing: bitsandbytes' `QuantState` of a weight in 4 bits.

    Returns:
        `(..., out)`. Keeps `x` and `(..., rank)` for the backward pass, nothing of the output's width.
    """
    output: torch.Tensor = _LoraProduct.apply(x, weight, bias, down, up, scaling, packing)
    return output


def can_fuse(layer: nn.Module) -> bool:
    """Whether `lora_linear` computes the same as this peft layer's own forward.

    That needs one active plain LoRA (no DoRA or other variant, no dropout, no bias of its own) on a frozen `nn.Linear`
    of the same dtype, or on one in bitsandbytes' 4 bits that computes in that dtype.
    """
    if not isinstance(layer, LoraLayer) or not (_is_plain(layer) or _is_4bit(layer)) or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    tensors = [base.bias, down.weight, up.weight, *([] if _is_4bit(layer) else [base.weight])]
    return (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and down.bias is None
        and up.bias is None
        and not any(p is not None and p.requires_grad for p in (base.weight, base.bias))
        and all(p is None or (type(p) is nn.Parameter and p.dtype == _computed_in(base)) for p in tensors)
    )


def _is_plain(layer: LoraLayer) -> bool:
    return type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear


def _is_4bit(layer: LoraLayer) -> bool:
    kind, base = type(layer), type(layer.base_layer)
    return kind.__name__ == base.__name__ == "Linear4bit" and kind.__module__ == "peft.tuners.lora.bnb"


def _computed_in(base: Any) -> torch.dtype:
    """The dtype of a base layer's products."""
    return base.compute_dtype if hasattr(base, "compute_dtype") else base.weight.dtype


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    base = layer.base_layer
    # what can change between two calls: the mode, the input, an adapter switched off or merged for a while
    plain = not (args or kwargs or layer.disable_adapters or layer.merged) and layer.training and name in layer.lora_A
    packing = getattr(base.weight, "quant_state", None)
    if _is_4bit(layer):  # on some processors an evaluation repacks the weights
        plain = plain and packing is not None and not getattr(packing, "packing_format_for_cpu", False)
    if not plain or x.dtype != _computed_in(base) or torch.is_autocast_enabled(x.device.type):
        output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    return lora_linear(
        x,
        base.weight,
        base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
        packing,
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
