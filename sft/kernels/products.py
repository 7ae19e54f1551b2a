"""Matrix products with a weight, by the library that is fastest on this processor.

On x86 processors with AVX-512, torch computes float32 products with MKL. oneDNN is about 10 % faster there, and 30 %
for the wide products of a language model head. Both compute in float32.

oneDNN caches a prepared product, about 0.8 MB, for every number of rows that it has met. The two caches are limited to
what the layers of one step share, so that memory does not grow with the number of steps.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch.nn import functional as F

MIN_ROWS = 32
"""With fewer rows, the call of oneDNN costs more time than it saves."""

MIN_WIDTH = 64
"""The same for the height and width of the weight."""

CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables with the capacity of torch's and of oneDNN's cache of prepared products."""

CACHED_PRODUCTS = 32
"""Capacity that these variables are set to, unless the user has set them."""


@lru_cache(maxsize=1)
def onednn_for_float32() -> bool:
    """Return whether oneDNN is available and faster for float32 on this processor, and limit its caches if so.

    This depends on the processor only and is not measured, so that every run makes the same choice.
    """
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    if not has_operator or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    for name in CACHES:  # both libraries read them at the first product
        os.environ.setdefault(name, str(CACHED_PRODUCTS))
    return True


def uses_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether oneDNN computes the product of rows `(num_rows, in)` with a weight."""
    # inductor has no code for this operator's arguments, and chooses its own products
    if torch.compiler.is_compiling():
        return False
    plain = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32 and rows.dim() == 2
    return plain and rows.shape[0] >= MIN_ROWS and torch.backends.mkldnn.enabled and onednn_for_float32()


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `rows @ weight.T + bias`, `(num_rows, out)`, for use inside autograd functions (oneDNN has no gradient).

    Args:
        rows: `(num_rows, in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """
    if not uses_onednn(rows, weight):
        return F.linear(rows, weight, bias)
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output


def back_through_linear(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `gradient @ weight`: a linear layer's input gradient `(num_rows, in)` from that of its output.

    Args:
        gradient: `(num_rows, out)`.
        weight: `(out, in)`.
    """
    if not uses_onednn(gradient, weight):
        return gradient @ weight
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
    return output


def shaped_like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return rows `(num_rows, out)` as `(..., out)`, for an input `(..., in)`.

    The result is not a view, so that a model may change the output of an autograd function in place.
    """
    output: torch.Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return output
