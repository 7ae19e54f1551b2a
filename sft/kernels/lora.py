"""Frozen linear layer and its LoRA update as one autograd function.

peft computes `base(x) + B(A(x)) * scaling` as five operations. Each of them is a separate pass over an activation of
the layer's width, forward and backward. Here a matrix product adds the update directly to the base layer's output
(`addmm_`), and likewise for the gradients. The order of the products is that of unsloth, but as a plain autograd
function for any device. A base weight in 4 bits is dequantized for each product and not kept.

`fused_lora` replaces the forward of a model's LoRA layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sft.kernels.comparison import kind_of, same_results
from sft.kernels.products import back_through_linear, linear, shaped_like


@dataclass(frozen=True)
class LoraWeights:
    """Weights of a frozen linear layer and its LoRA update.

    Attributes:
        weight: `(out, in)`, or packed 4-bit data; frozen.
        bias: `(out,)` or None; frozen.
        down: LoRA's A, `(rank, in)`.
        up: LoRA's B, `(out, rank)`.
        scaling: Factor of the update, usually `lora_alpha / rank`.
        packing: `QuantState` of bitsandbytes for a weight in 4 bits; None for any other.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    packing: Any = None

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output `(num_rows, out)` and LoRA's inner states `(num_rows, rank)` of rows `(num_rows, in)`."""
        inner = rows @ self.down.t()
        output = linear(rows, self.unpacked(rows.dtype), self.bias)
        return output.addmm_(inner, self.up.t(), alpha=self.scaling), inner

    def back(
        self, grad: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, needed: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Compute the gradients of the rows, A and B from that of the output.

        With `g = grad @ B * scaling`, `(num_rows, rank)`:

        - rows: `grad @ W + g @ A`
        - A: `g^T @ rows`
        - B: `(inner^T @ grad * scaling)^T`

        Args:
            grad: `(num_rows, out)` gradient of the output.
            rows: `(num_rows, in)` input.
            inner: `(num_rows, rank)` from `project`.
            needed: Which of the three gradients to compute.

        Returns:
            Gradients of rows, A and B; None for one that is not needed.
        """
        grad_inner = (grad @ self.up).mul_(self.scaling)
        grad_rows = None
        if needed[0]:
            grad_rows = back_through_linear(grad, self.unpacked(grad.dtype)).addmm_(grad_inner, self.down)
        grad_down = grad_inner.t() @ rows if needed[1] else None
        # transposed, so that the product reads the wide gradient row by row
        grad_up = (inner.t() @ grad).mul_(self.scaling).t() if needed[2] else None
        return grad_rows, grad_down, grad_up

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as `(out, in)`, dequantized to `dtype` if it is packed."""
        if self.packing is None:
            return self.weight
        from bitsandbytes.functional import dequantize_4bit

        dense: torch.Tensor = dequantize_4bit(self.weight, self.packing).to(dtype)
        return dense


class _LoraProduct(torch.autograd.Function):
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` with frozen W and bias; W may be packed in 4 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, frozen: LoraWeights) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output, inner = replace(frozen, down=down, up=up).project(rows)
        ctx.save_for_backward(rows, frozen.weight, down, up, inner)
        ctx.rest, ctx.shape = (frozen.scaling, frozen.packing), x.shape
        return shaped_like(output, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        weights = LoraWeights(weight, None, down, up, *ctx.rest)
        grad = grads[0].reshape(-1, up.shape[0])
        grad_x, grad_down, grad_up = weights.back(grad, rows, inner, ctx.needs_input_grad)
        return None if grad_x is None else grad_x.view(ctx.shape), grad_down, grad_up, None


class _GatedLoraProduct(torch.autograd.Function):
    """`_LoraProduct` of `silu(gate) * x`, which is not kept but computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, frozen: LoraWeights
    ) -> torch.Tensor:
        rows = F.silu(gate).mul_(x).reshape(-1, x.shape[-1])
        output, inner = replace(frozen, down=down, up=up).project(rows)
        ctx.save_for_backward(gate, x, frozen.weight, down, up, inner)
        ctx.rest = frozen.scaling, frozen.packing
        return shaped_like(output, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, x, weight, down, up, inner = ctx.saved_tensors
        weights = LoraWeights(weight, None, down, up, *ctx.rest)
        activated = F.silu(gate)
        rows = (activated * x).reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, up.shape[0])
        grad_rows, grad_down, grad_up = weights.back(grad, rows, inner, (True, *ctx.needs_input_grad[2:]))
        assert grad_rows is not None  # it was requested above
        grad_x = grad_rows.view(x.shape)
        grad_gate = torch.ops.aten.silu_backward(grad_x * x, gate)
        return grad_gate, activated.mul_(grad_x), grad_down, grad_up, None


def lora_linear(x: torch.Tensor, weights: LoraWeights) -> torch.Tensor:
    """Return the output of a frozen linear layer plus its LoRA update (Hu et al., arXiv:2106.09685).

    Args:
        x: Input, `(..., in)`.
        weights: Of the layer.

    Returns:
        `(..., out)`. The backward pass keeps `x` and the inner states `(..., rank)`, but nothing of width `out`.
    """
    output: torch.Tensor = _LoraProduct.apply(x, weights.down, weights.up, weights)
    return output


def gated_lora_linear(gate: torch.Tensor, x: torch.Tensor, weights: LoraWeights) -> torch.Tensor:
    """Return `lora_linear` of `silu(gate) * x`, the last step of a SwiGLU layer (Shazeer, arXiv:2002.05202).

    Args:
        gate: `(..., in)`.
        x: `(..., in)`.
        weights: Of the layer.

    Returns:
        `(..., out)`. The backward pass keeps `gate` and `x`, but not their product.
    """
    output: torch.Tensor = _GatedLoraProduct.apply(gate, x, weights.down, weights.up, weights)
    return output


def can_fuse(layer: nn.Module) -> bool:
    """Return whether `lora_linear` computes the same as the forward of this peft layer.

    It does for one active, plain LoRA adapter (no DoRA or other variant, no dropout, no bias in A or B) on a frozen
    `nn.Linear` of the same dtype, or on a 4-bit layer of bitsandbytes that computes in that dtype.
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
    """Return the dtype of a base layer's products."""
    return base.compute_dtype if hasattr(base, "compute_dtype") else base.weight.dtype


def fused_weights(layer: Any, x: torch.Tensor) -> LoraWeights | None:
    """Return the weights for `lora_linear`, or None if the layer can't run fused on this input now.

    Args:
        layer: A layer that `fused_lora` replaced, or any other module (None).
        x: Its input.
    """
    forward = vars(layer).get("forward")
    if getattr(forward, "func", None) is not _forward:
        return None
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    base = layer.base_layer
    # these may change between two calls: training mode, dtype of the input, an adapter that is disabled or merged
    plain = not (layer.disable_adapters or layer.merged) and layer.training and name in layer.lora_A
    packing = getattr(base.weight, "quant_state", None)
    if _is_4bit(layer):  # on some processors bitsandbytes repacks the weights in evaluation mode
        plain = plain and packing is not None and not getattr(packing, "packing_format_for_cpu", False)
    if not plain or x.dtype != _computed_in(base) or torch.is_autocast_enabled(x.device.type):
        return None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LoraWeights(base.weight, base.bias, down, up, layer.scaling[name], packing)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run a LoRA layer fused if that is possible now, else its own forward."""
    weights = None if args or kwargs else fused_weights(layer, x)
    if weights is None:
        output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    return lora_linear(x, weights)


def _is_same(layer: Any) -> bool:
    """Compare a layer's own output and gradients with the fused ones on random rows `(1, 3, width)`."""
    name = layer.active_adapters[0]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if down.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, down.shape[1], generator=generator).to(down)

    def fused(x: torch.Tensor) -> torch.Tensor:
        base = layer.base_layer
        packing = getattr(base.weight, "quant_state", None)
        return lora_linear(x, LoraWeights(base.weight, base.bias, down, up, layer.scaling[name], packing))

    try:
        with nonzero_update(up):
            return same_results(partial(type(layer).forward, layer), fused, x, (down, up))
    except Exception:  # code that is not known may fail on such rows in any way
        return False


@contextmanager
@torch.no_grad()
def nonzero_update(*ups: torch.Tensor) -> Iterator[None]:
    """Add random numbers to weights B of LoRA layers inside the block; as long as B is zero, A has no effect."""
    before = [up.clone() for up in ups]
    generator = torch.Generator().manual_seed(0)
    try:
        for up in ups:
            up.add_(torch.randn(up.shape, generator=generator).to(up) * 0.02)
        yield
    finally:
        for up, saved in zip(ups, before, strict=True):
            up.copy_(saved)


@contextmanager
def fused_lora(model: nn.Module, left_out: Collection[type] = ()) -> Iterator[int]:
    """Replace the forward of the LoRA layers that `can_fuse` accepts by `lora_linear`, inside the block.

    One layer of each kind is run both ways first; a kind whose results differ is left out.

    Args:
        model: The model.
        left_out: Classes of layers that keep their own forward.

    Yields:
        Number of replaced layers.
    """
    same: dict[tuple[object, ...], bool] = {}
    layers = []
    for module in model.modules():
        if type(module) not in left_out and can_fuse(module):
            kind = kind_of(module)
            if kind not in same:
                same[kind] = _is_same(module)
            layers += [module] if same[kind] else []
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward
