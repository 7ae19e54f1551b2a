"""Types of tokens that a model is given with rows of text.

Some vision-language models take the type of each token (text, image, beginning of an answer) as an input, and do not
train on text without it: Molmo 2 raises an error, PaliGemma lets tokens see later ones. `add_token_types` finds the
type by which a model trains on text, by trying it out, and has the model add this input to every row of text.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from sft.attention.causality import probe_causality
from sft.inner_model import causal_lm, evaluating, in_training

TEXT_TYPES = (0, 1)
"""Values that are tried as the type of text."""

MEDIA = ("pixel_", "image_", "video_", "audio_", "mm_encoder_")
"""Beginnings of the names of arguments that hold images and other media."""


def add_token_types(model: nn.Module) -> dict[str, int]:
    """Have a model add the type of text to rows of text, if it is not causal, or does not run, without.

    The types are added to the input of the part below the head: peft calls the forward of the complete model without
    its hooks.

    Args:
        model: Model, wrapped or not.

    Returns:
        Name of the input that is added -> its value for every token; empty if there is none.
    """
    base = causal_lm(model)
    inner = getattr(base, "base_model", None)
    if not isinstance(inner, nn.Module) or inner is base:
        return {}
    names = [name for name in inspect.signature(inner.forward).parameters if name.endswith("token_type_ids")]
    if not names:
        return {}
    present = _added(inner)
    if present or _is_causal(base):
        return present
    for types in ({name: value} for name in names for value in TEXT_TYPES):
        handle = inner.register_forward_pre_hook(partial(_add, types), with_kwargs=True)
        if _is_causal(base):
            return types
        handle.remove()
    return {}


def _added(inner: nn.Module) -> dict[str, int]:
    hooks = inner._forward_pre_hooks.values()
    return next((hook.args[0] for hook in hooks if isinstance(hook, partial) and hook.func is _add), {})


def _is_causal(base: Any) -> bool:
    """Return whether no token sees later ones, neither in evaluation nor in training."""
    try:
        return all(probe_causality(base, mode) is not None for mode in (evaluating, in_training))
    except ValueError:
        return False


def _add(
    types: dict[str, int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add the types to the arguments of a row of text; those of a row with images are the processor's."""
    ids = args[0] if args else kwargs.get("input_ids")
    states = kwargs.get("inputs_embeds")
    tokens = ids if ids is not None else None if states is None else states[..., 0]
    if tokens is None or any(value is not None and name.startswith(MEDIA) for name, value in kwargs.items()):
        return args, kwargs
    missing = {name: value for name, value in types.items() if kwargs.get(name) is None}
    device = tokens.device
    return args, {**kwargs, **{name: torch.full(tokens.shape, value, device=device) for name, value in missing.items()}}
