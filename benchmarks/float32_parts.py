"""Float64 in those parts of a model that its own code computes in float32.

Many models compute norms, softmax, routers or rotary embeddings in float32, whatever the precision of their weights. If
these are float64, a value that moves by an error of float64 may there round to the next number of float32, so that two
ways to compute the same differ by some 1e-7. Without these roundings they differ by some 1e-15.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import sft

LIBRARY = str(Path(sft.__file__).parent)

TORCH = str(Path(torch.__file__).parent)


class _CastsToFloat64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_called_by_library():
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def no_float32() -> Iterator[None]:
    """Have all casts to float32 give float64 inside the block, except those in the code of this library.

    A cast of the library's own is therefore a difference between its results and those of a plain loop.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _CastsToFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _is_called_by_library() -> bool:
    """Return whether the first caller outside torch is code of this library."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(LIBRARY)
