"""Prefix cache: keys and values of the tokens that all sequences begin with, such as a system prompt, computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from sft.common_prefix import common_prefix_length

MIN_TOKENS = 8
"""Shortest prefix that is cached. For shorter ones, copying keys and values takes about as long as computing them."""


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of the first `length` tokens; if nothing is shared, `length` is 0 and `cache` is None."""

    length: int = 0
    cache: DynamicCache | None = None

    def rows(self, num_rows: int) -> DynamicCache | None:
        """Return a new cache for a batch of `num_rows` sequences that continue after the prefix."""
        if self.cache is None:
            return None
        repeated = copy.deepcopy(self.cache)
        repeated.batch_repeat_interleave(num_rows)
        return repeated

    def mask(self, rest: torch.Tensor) -> torch.Tensor:
        """Prepend the prefix to the attention mask of the rest, `(batch, rest)`; returns `(batch, length + rest)`."""
        return torch.cat([rest.new_ones(rest.shape[0], self.length), rest], dim=1)


@torch.inference_mode()
def share_prefix(model: nn.Module, sequences: Sequence[Sequence[int]], limit: int) -> SharedPrefix:
    """Run the model once on the tokens that all sequences begin with.

    Nothing is shared if a layer does not cache all keys and values unchanged, as with sliding windows or recurrent
    states.

    Args:
        model: Causal language model.
        sequences: Token ids, `(num_sequences, length)`, ragged.
        limit: Largest number of tokens to share. Tokens whose outputs are needed must come after it.
    """
    if len(sequences) < 2:
        return SharedPrefix()
    # the first and the last sequence in lexicographic order share exactly what all sequences share
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    length = max(0, min(limit, common_prefix_length(first, last)))
    parameters = forward_parameters(model)
    if length < MIN_TOKENS or not {"past_key_values", "position_ids"} <= parameters:
        return SharedPrefix()
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([list(sequences[0][:length])], device=device),
        "use_cache": True,
    }
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = 1
    cache = model(**inputs).past_key_values
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return SharedPrefix()
    return SharedPrefix(length, cache)


def forward_parameters(model: Any) -> set[str]:
    """Return the parameter names of a model's forward; with an adapter, those of the base model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
