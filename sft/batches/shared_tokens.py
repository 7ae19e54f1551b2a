"""Plan of the tokens of a flat row that a model must compute: beginnings shared by several documents only once.

In a causal model the states of a token depend only on the token itself and those before it in its document. So
documents that begin with the same tokens (a system prompt, one question with several answers) have the same states
there, and no target depends on the last target itself or on tokens after it. The layers compute only the remaining
tokens, with the same losses and gradients except for rounding. Attention is given the complete documents.

Example: the documents P Q a b, P Q c and P R d e, with labels on all tokens. The last token of each is a target, but
no other target depends on it:

    row        P  Q  a  b  P  Q  c  P  R  d  e
    computed   P  Q  a                 R  d         positions 0 1 2 8 9
    places     0  1  2 -1  0  1 -1  0  3  4 -1      index in `computed` of each token's states
    lengths    3, 2, 3                              of the documents that attention sees
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from sft.common_prefix import common_prefix_length
from sft.labels import IGNORE_INDEX

Array = np.ndarray[Any, Any]
MIN_SHARE = 0.03
"""Least share of tokens that sharing beginnings must save; below it, copying keys and values costs more time."""


@dataclass(frozen=True)
class SharedTokens:
    """Tokens of a flat row that the layers compute, and how to restore its documents; int64 arrays or tensors.

    Attributes:
        computed: `(num_computed,)` positions in the row, ascending.
        places: `(num_tokens,)` index into `computed` of each token's states; -1 if nothing depends on them.
        attended_lengths: `(num_documents,)` tokens of each document that attention sees, all above 0. Documents without
            a target are dropped.
    """

    computed: Any
    places: Any
    attended_lengths: Any

    def to_batch(self) -> dict[str, torch.Tensor]:
        """Return the plan as tensors of a batch, under the names of the attributes."""
        return {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)}


SHARED_KEYS = tuple(field.name for field in fields(SharedTokens))
"""Keys of a batch that has a plan."""


def without_sharing(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the batch without its plan, so that the model computes all tokens."""
    return {name: value for name, value in batch.items() if name not in SHARED_KEYS}


def share_tokens(input_ids: Array, labels: Array, lengths: Array, weights: Array | None = None) -> SharedTokens | None:
    """Plan which tokens of a flat row are computed.

    1. Cut each document before its last target; drop documents without a target.
    2. Find the owner of each remaining token: the first position in the row whose document has the same tokens up to
       there, so that its states are the same.
    3. Compute the owners only; but if that saves less than `MIN_SHARE` of the tokens, compute every remaining token.

    Args:
        input_ids: `(num_tokens,)`.
        labels: `(num_tokens,)`, the first of each document ignored.
        lengths: `(num_documents,)` tokens of each document.
        weights: `(num_tokens,)` factor of each label's loss; tokens that weigh 0 are not targets.

    Returns:
        The plan; None if every token must be computed, or the row has no target.
    """
    starts = np.cumsum(lengths) - lengths
    targets = labels != IGNORE_INDEX if weights is None else (labels != IGNORE_INDEX) & (weights > 0)
    attended = np.array([_last(targets[start : start + length]) for start, length in zip(starts, lengths, strict=True)])
    num_attended = int(attended.sum())
    documents = [slice(int(start), int(start + kept)) for start, kept in zip(starts, attended, strict=True) if kept]
    owners = _owners(input_ids, documents)
    computed = np.unique(owners[owners >= 0])
    if len(computed) > (1 - MIN_SHARE) * num_attended:
        computed = np.concatenate([np.arange(d.start, d.stop) for d in documents]) if documents else computed
        owners = np.full(len(input_ids), -1)
        owners[computed] = computed
    if len(computed) in (0, len(input_ids)):
        return None
    places = np.where(owners >= 0, np.searchsorted(computed, owners), -1)
    return SharedTokens(computed, places, attended[attended > 0])


def _last(targets: Array) -> int:
    """Return the position of the last target in a document, which is the number of tokens before it; 0 if none."""
    found = np.flatnonzero(targets)
    return int(found[-1]) if len(found) else 0


def _owners(input_ids: Array, documents: list[slice]) -> Array:
    """Return for each token the first position that has the same states, `(num_tokens,)`; -1 outside the documents.

    1. Sort the documents by their tokens, so that each shares its longest beginning with the one before it.
    2. Tokens of that beginning take over the owners of the document before; all others own themselves.
    3. Replace each owner by the first position in the row that it owns, since sorting changed the order.
    """
    owners = np.full(len(input_ids), -1)
    previous = slice(0, 0)
    for document in sorted(documents, key=lambda place: input_ids[place].astype(">u4").tobytes()):
        shared = common_prefix_length(input_ids[previous].data, input_ids[document].data)
        owners[document] = np.arange(document.start, document.stop)
        owners[document.start : document.start + shared] = owners[previous.start : previous.start + shared]
        previous = document
    covered = np.flatnonzero(owners >= 0)
    first = np.full(len(owners), len(owners))
    np.minimum.at(first, owners[covered], covered)
    owners[covered] = first[owners[covered]]
    return owners


@dataclass(frozen=True)
class Sharing:
    """Maps between the tokens that layers compute and the attended tokens: the complete documents, one after another.

    Attributes:
        sources: `(num_attended,)` index of each attended token among the computed ones.
        kept: `(num_computed,)` index of each computed token among the attended ones.
        copies: `(num_attended - num_computed,)` indices of the attended tokens that are copies of a computed one.
    """

    sources: torch.Tensor
    kept: torch.Tensor
    copies: torch.Tensor

    @property
    def num_computed(self) -> int:
        """Number of tokens that the layers compute."""
        return self.kept.shape[0]

    def to_documents(self, states: torch.Tensor) -> torch.Tensor:
        """Copy computed tokens `(1, heads, num_computed, dim)` into documents `(1, heads, num_attended, dim)`."""
        output: torch.Tensor = _Gather.apply(states, self)
        return output

    def to_computed(self, states: torch.Tensor) -> torch.Tensor:
        """Pick the computed tokens `(1, num_computed, heads, dim)` of documents `(1, num_attended, heads, dim)`."""
        output: torch.Tensor = _Pick.apply(states, self)
        return output


def sharing_of(batch: Mapping[str, Any]) -> Sharing | None:
    """Return the maps for attention from the plan in a batch; None if the plan only cuts documents.

    Args:
        batch: With the keys of `SharedTokens`, as tensors.
    """
    places = batch["places"]
    sources = places[places >= 0]
    num_computed = batch["computed"].shape[0]
    if len(sources) == num_computed:
        return None
    attended = torch.full_like(places, -1)
    attended[places >= 0] = torch.arange(len(sources), device=places.device)
    kept = attended[batch["computed"]]
    is_copy = torch.ones_like(sources, dtype=torch.bool)
    is_copy[kept] = False
    return Sharing(sources, kept, is_copy.nonzero().squeeze(-1))


class _Gather(torch.autograd.Function):
    """Gather whose backward pass adds up gradients for copied tokens only, and picks those of all others."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, sharing: Sharing) -> torch.Tensor:
        ctx.sharing = sharing
        return states.index_select(2, sharing.sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sharing: Sharing = ctx.sharing
        gradient = grads[0].index_select(2, sharing.kept)
        copied = grads[0].index_select(2, sharing.copies)
        return gradient.index_add_(2, sharing.sources[sharing.copies], copied), None


class _Pick(torch.autograd.Function):
    """Selection without repeats, so that its backward pass copies gradients instead of adding them up."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, sharing: Sharing) -> torch.Tensor:
        ctx.sharing = sharing
        return states.index_select(1, sharing.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sharing: Sharing = ctx.sharing
        shape = list(grads[0].shape)
        shape[1] = sharing.sources.shape[0]
        return grads[0].new_zeros(shape).index_copy_(1, sharing.kept, grads[0]), None
