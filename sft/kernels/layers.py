"""Fused RMS norms, SwiGLU feed-forward and linear layers: one autograd function each, with fewer passes over memory.

In plain PyTorch, an RMS norm (Zhang & Sennrich, arXiv:1910.07467) keeps its input, the input's square and the
normalized input for the backward pass. A SwiGLU layer (Shazeer, arXiv:2002.05202) keeps the gate before and after its
activation, and their product as LoRA's input. Here each keeps its inputs only and recomputes the rest in place. Linear
layers use the matrix products of `sft.kernels.products`.

`fused_layers` replaces the forward of a model's layers while they train.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sft.inner_model import evaluating
from sft.kernels.comparison import kind_of, same_results
from sft.kernels.lora import fused_weights, gated_lora_linear
from sft.kernels.products import MIN_WIDTH, back_through_linear, linear, onednn_for_float32, shaped_like

Fused = Callable[[Any, torch.Tensor], torch.Tensor]
"""Module and its input -> its output."""


class _RmsNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    With `s = 1 / sqrt(mean(x^2) + eps)`, `n` the width and `g` the incoming gradient:

    - gradient of `weight`: the sum of `g * x * s` over all rows
    - gradient of `x`: `s * g * weight - x * s^3 / n * sum(g * weight * x)`
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grads[0] * x).mul_(scale).reshape(-1, x.shape[-1]).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        gradient = grads[0] * weight
        along_x = (gradient * x).sum(-1, keepdim=True)
        factor = scale.pow(3).mul_(along_x).div_(-x.shape[-1])
        return gradient.mul_(scale).addcmul_(x, factor), grad_weight, None


class _GatedSilu(torch.autograd.Function):
    """`silu(gate) * up`; keeps `gate` and `up`, and computes `silu(gate)` again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, F.silu(gate).mul_(grads[0])


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` with the products of `sft.kernels.products`; keeps `x` only if the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return shaped_like(linear(flat, weight, bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight = ctx.saved_tensors
        gradient = grads[0].reshape(-1, weight.shape[0])
        grad_x = back_through_linear(gradient, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_weight = gradient.t() @ flat if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm `weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    Args:
        x: `(..., width)`.
        weight: `(width,)`.
        eps: Added to the mean square.
    """
    output: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return output


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of two tensors of the same shape."""
    output: torch.Tensor = _GatedSilu.apply(gate, up)
    return output


def linear_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`, `(..., out)`, with gradients.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """
    output: torch.Tensor = _Linear.apply(x, weight, bias)
    return output


def _norm_eps(module: nn.Module) -> float:
    """Return the epsilon of a norm under either of its two usual names; 0 if there is none."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else 0.0


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, _norm_eps(module))


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):  # autocast chooses the precision of F.linear
        return F.linear(x, module.weight, module.bias)
    return linear_layer(x, module.weight, module.bias)


def _feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    weights = fused_weights(module.down_proj, gate)
    output: torch.Tensor = (
        module.down_proj(gated_silu(gate, up)) if weights is None else gated_lora_linear(gate, up, weights)
    )
    return output


def _looks_like_norm(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    is_norm = "RMSNorm" in type(module).__name__ and not list(module.children()) and _norm_eps(module) > 0
    return is_norm and type(weight) is nn.Parameter and weight.dim() == 1


def _looks_like_feed_forward(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _gains_from_products(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"
    return plain and min(module.weight.shape) >= MIN_WIDTH and onednn_for_float32()


def can_be_fused(module: nn.Module) -> bool:
    """Return whether a module looks like one of those that are fused, and nothing stands in the way."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if not (_looks_like_norm(module) or _gains_from_products(module) or _looks_like_feed_forward(module)):
        return False
    return all(p.dtype == torch.float32 for p in module.parameters() if p.is_floating_point())


def fused_forward(module: nn.Module) -> Fused | None:
    """Return the fused function for a module, or None if there is none that gives the same output and gradients.

    Norms and feed-forward layers are recognized by their names and structure, so the results are compared on a few
    random rows first.

    Args:
        module: Any module. None for one that has a replaced forward, hooks, or parameters that are not float32.
    """
    if not can_be_fused(module):
        return None
    if _looks_like_norm(module):
        width, compute = module.weight.shape[0], _norm
    elif _gains_from_products(module):
        width, compute = module.weight.shape[1], _linear
    elif _looks_like_feed_forward(module):
        width, compute = getattr(module.gate_proj, "in_features", None), _feed_forward
    else:
        return None
    return compute if isinstance(width, int) and _is_same(module, compute, width) else None


def _takes_one_input(module: nn.Module) -> bool:
    """Return whether a module can be called with one input; gated norms of recurrent layers need their gate as well."""
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except TypeError:
        return False
    return True


def _is_same(module: nn.Module, compute: Fused, width: int) -> bool:
    """Compare a module's own output and gradients with the fused ones on random rows `(1, 3, width)`."""
    if not _takes_one_input(module):
        return False
    device, generator = next(module.parameters()).device, torch.Generator().manual_seed(0)
    if device.type == "meta":
        return False
    x = torch.randn(1, 3, width, generator=generator).to(device)
    try:
        with evaluating(module):
            return same_results(partial(type(module).forward, module), partial(compute, module), x, module.parameters())
    except Exception:  # code that is not known may fail on such rows in any way
        return False


def _forward(module: nn.Module, compute: Fused, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run a module fused if it is training in float32 and has one input, else its own forward."""
    if module.training and len(args) == 1 and not kwargs and args[0].dtype == torch.float32:
        return compute(module, args[0])
    output: torch.Tensor = type(module).forward(module, *args, **kwargs)
    return output


@contextmanager
def fused_layers(model: nn.Module, left_out: Collection[type] = ()) -> Iterator[int]:
    """Replace the forward of the layers that `fused_forward` supports, inside the block.

    They run fused while they are in training mode; in evaluation mode their own forward runs.

    Args:
        model: The model.
        left_out: Classes of layers that keep their own forward.

    Yields:
        Number of replaced layers.
    """
    computed: dict[tuple[object, ...], Fused | None] = {}
    fused: list[tuple[Any, Fused]] = []
    for module in model.modules():
        if not can_be_fused(module) or type(module) in left_out:
            continue
        kind = kind_of(module)
        if kind not in computed:
            computed[kind] = fused_forward(module)
        compute = computed[kind]
        if compute is not None:
            fused.append((module, compute))
    for module, compute in fused:
        module.forward = partial(_forward, module, compute)
    try:
        yield len(fused)
    finally:
        for module, _ in fused:
            del module.forward
