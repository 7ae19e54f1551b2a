"""Matrix products with a weight, by the library of those at hand that is fastest on this processor.

On x86 processors with AVX-512 torch leaves float32 products to MKL, where oneDNN's are some 10 % faster (a head's wide
ones 30 %). Both round as float32 products do. oneDNN keeps what it has prepared for every number of rows it met, some
0.8 MB a product; two short caches hold what the layers of one step share, so that memory does not grow with the steps.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch.nn import functional as F

MIN_ROWS = 32
MIN_WIDTH = 64
"""Below so many rows, or columns of the weight, choosing costs more than it gains."""


CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""The environment's names for how much torch's and oneDNN's caches of prepared products hold."""
CACHED_PRODUCTS = 32


@lru_cache(maxsize=1)
def onednn_for_float32() -> bool:
    """Whether oneDNN is there and multiplies float32 faster on this processor; the same at every run."""
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    if not has_operator or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    for name in CACHES:  # read at the first product
        os.environ.setdefault(name, str(CACHED_PRODUCTS))
    return True


def uses_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of `(num_rows, in)` with a weight is left to oneDNN."""
    plain = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32 and rows.dim() == 2
    return plain and rows.shape[0] >= MIN_ROWS and torch.backends.mkldnn.enabled and onednn_for_float32()


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias`, without a gradient of its own.

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
    """`gradient @ weight`: from a linear layer's output `(num_rows, out)` to its input `(num_rows, in)`."""
    if not uses_onednn(gradient, weight):
        return gradient @ weight
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
    return output
