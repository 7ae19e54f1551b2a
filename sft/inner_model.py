"""Unwrap models, ask what they take and learn, and run blocks in evaluation mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def causal_lm(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers such as those of DDP, `torch.compile` and peft."""
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
    """Return whether the adapter adds learned virtual tokens before each row (prompt tuning and similar methods)."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def takes_position_ids(model: nn.Module) -> bool:
    """Return whether the model's forward takes `position_ids`; others count positions themselves, or have none."""
    return "position_ids" in inspect.signature(causal_lm(model).forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block; afterwards each module has the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
