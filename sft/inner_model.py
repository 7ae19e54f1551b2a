"""Unwrap models, ask about their parts and what they take and learn, and run blocks in evaluation or training mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
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


def on_model(inputs: Mapping[str, torch.Tensor], model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a model's inputs on its device, those with floating-point numbers, as of images, in its dtype.

    Args:
        inputs: Tensors by the name of the argument.
        model: The model, wrapped or not.
        device: Where its parameters are.
    """
    return {
        name: value.to(device, causal_lm(model).dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def outside_language_model(model: nn.Module) -> list[str]:
    """Return the names of the parts of a vision-language model that no text passes, such as its image tower.

    Args:
        model: Model of transformers, wrapped or not. One of text alone has none. The head is never among them.
    """
    base = causal_lm(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    decoder = decoder or getattr(base, "language_model", None)  # Llama 4 does not say which part it is
    if decoder is None or not hasattr(base.config, "vision_config"):
        return []
    text = {id(module) for module in decoder.modules()} | {id(base.get_output_embeddings())}
    outside: list[str] = []
    for name, module in base.named_modules():
        if is_inside(name, outside) or any(id(part) in text for part in module.modules()):
            continue
        outside.append(name)
    return outside


def is_inside(name: str, parts: Iterable[str]) -> bool:
    """Return whether a module is one of the parts of a model, or in one of them.

    Args:
        name: Name of the module.
        parts: Names of the parts.
    """
    return any(name == part or name.startswith(f"{part}.") for part in parts)


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


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode inside the block; afterwards modes and buffers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
