"""Comparison of a module with a faster computation of the same: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Run = Callable[[torch.Tensor], torch.Tensor]
"""Input of a module -> its output."""


def same_results(own: Run, fused: Run, x: torch.Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether two computations have the same output and the same gradients, except for rounding.

    Args:
        own: The module as it is.
        fused: What is to replace it.
        x: Input of both.
        parameters: Of the module; those that are trained have gradients.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    expected, found = (_results(run, x, trained) for run in (own, fused))
    for one, other in zip(expected, found, strict=True):
        if (one is None) != (other is None):
            return False
        if one is not None and other is not None and not _close(one, other):
            return False
    return True


def _results(run: Run, x: torch.Tensor, trained: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """Return the output, and the gradients of input and trained parameters for a fixed gradient of the output."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = run(x)
        gradient = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)
        gradients = torch.autograd.grad(output, [x, *trained], gradient, allow_unused=True)
    return [output.detach(), *gradients]


def _close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    tolerance = 1e-5 if torch.finfo(expected.dtype).eps < 1e-6 else 5e-2
    expected, found = expected.float(), found.float()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6)


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """Return what decides how a module computes: its class, its tensors' shapes and dtypes, its plain attributes.

    Modules of one kind compute the same function of their input and weights, so that one of them is compared for all.
    """
    tensors = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters())
    plain = tuple(
        (name, value) for name, value in sorted(vars(module).items()) if isinstance(value, bool | int | float | str)
    )
    return (type(module), tensors, plain, *(type(child) for child in module.modules()))
