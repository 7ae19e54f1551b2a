"""Computes once what many sequences begin with, such as the system prompt that all rows of a data set share."""

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
"""Below this many tokens, copying keys and values costs about what computing them does."""


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of `length` tokens; `length` is 0 and there is no cache where nothing is shared."""

    length: int = 0
    cache: DynamicCache | None = None

    def rows(self, num_rows: int) -> DynamicCache | None:
        """A cache of its own for a batch of `num_rows` sequences that go on after the prefix."""
        if self.cache is None:
            return None
        repeated = copy.deepcopy(self.cache)
        repeated.batch_repeat_interleave(num_rows)
        return repeated

    def mask(self, rest: torch.Tensor) -> torch.Tensor:
        """The attention mask `(batch, length + rest)` of prefix and rest."""
        return torch.cat([rest.new_ones(rest.shape[0], self.length), rest], dim=1)


@torch.inference_mode()
def share_prefix(model: nn.Module, sequences: Sequence[Sequence[int]], limit: int) -> SharedPrefix:
    """Run the model once over the tokens that all sequences begin with.

    Only where every layer keeps all keys and values as they are, so that sliding windows and recurrent states never
    come into it.

    Args:
        model: a causal language model.
        sequences: token ids, `(num_sequences, length)`, ragged.
        limit: most tokens to share: the tokens whose outputs are needed must stay in the rest.
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
    """Names of what a model's forward takes, seen through an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
