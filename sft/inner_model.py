"""The transformers model inside what others put around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside wrappers such as those of DDP, `torch.compile` and PEFT."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif not hasattr(inner, "config") and hasattr(inner, "module"):
            inner = inner.module
        else:
            return inner


def learns_prompt(model: nn.Module) -> bool:
    """Whether the adapter is learnt tokens before the row (prompt tuning and the like), which lengthen it."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is back in its own mode, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
