"""Probe that a model is causal: that it has logits over the vocabulary, in which no token sees the tokens after it.

A model that reads the tokens after a token copies them and learns nothing from predicting the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from sft.attention.isolation import rounding_tolerances
from sft.inner_model import evaluating

NUM_PROBE_TOKENS = 8


@torch.no_grad()
def probe_causality(base: Any, mode: Callable[[Any], AbstractContextManager[None]] = evaluating) -> float | None:
    """Run a model on two rows that differ in their last token, and compare the logits of the tokens before it.

    Args:
        base: Model of transformers, without wrappers.
        mode: `evaluating` or `in_training`; both rows are run with the same random numbers.

    Returns:
        The largest difference, relative to the largest logit; None if the model can't be run (its weights are
        elsewhere, or it takes more than token ids).

    Raises:
        ValueError: It returns no logits over the vocabulary, or earlier tokens see later ones.
    """
    name = type(base).__name__
    embeddings = _input_embeddings(base)
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        raise ValueError(f"{name} has no token embeddings (get_input_embeddings)")
    if weight.is_meta or hasattr(weight, "ds_id") or not weight.numel():
        return None
    num_tokens = weight.shape[0]
    rows = torch.arange(2 * NUM_PROBE_TOKENS).reshape(2, -1)[:1].repeat(2, 1) * 7 % num_tokens
    rows[1, -1] = (rows[1, -1] + num_tokens // 2) % num_tokens
    outputs = []
    try:
        with mode(base), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            for row in rows:
                torch.manual_seed(0)
                outputs.append(base(input_ids=row[None].to(weight.device)))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError):
        return None
    first, second = (getattr(output, "logits", None) for output in outputs)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        raise ValueError(f"{name} returns no logits")
    if first.ndim != 3 or first.shape[1] != NUM_PROBE_TOKENS or first.shape[2] < num_tokens / 2:
        raise ValueError(
            f"{name} returns logits {tuple(first.shape)} for a row of {NUM_PROBE_TOKENS} tokens and a vocabulary of "
            f"{num_tokens}"
        )
    scale = first.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    effect = ((first - second)[0, :-1].float().abs().max() / scale).item()
    tolerance = rounding_tolerances(base)[0] if hasattr(base, "device") else 1e-5
    if effect > tolerance:
        way_out = "; set config.is_decoder=True" if getattr(base.config, "is_decoder", None) is False else ""
        raise ValueError(
            f"{name} attends in both directions: another last token changed the logits of the tokens before it by "
            f"{effect:.1e} of the largest one{way_out}"
        )
    return effect


def _input_embeddings(base: Any) -> Any:
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
