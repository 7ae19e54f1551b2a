"""Which tokens of a flat row a model has to compute: common beginnings once, nothing behind a document's last target.

In a causal model a token's states depend on the tokens before it in its document and on nothing else. Documents that
begin with the same tokens (a system prompt, one question with several answers) have the same states there, and no
target depends on tokens behind a document's last one. So the layers run on fewer tokens, with the same losses and
gradients but for rounding; attention alone sees every document whole. With `row` as the documents P Q a b, P Q c and
P R d e, the last token of each being a target only:

    row        P  Q  a  b  P  Q  c  P  R  d  e
    computed   P  Q  a           .     R  d         positions 0 1 2 8 9
    places     0  1  2 -1  0  1 -1  0  3  4 -1      where in `computed` a token's states are
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
"""Share of tokens that must be saved by sharing beginnings before it pays for gathering keys and values."""


@dataclass(frozen=True)
class SharedTokens:
    """What a flat row's layers compute, and how attention finds its documents in it; int64 arrays or tensors.

    Attributes:
        computed: `(num_computed,)` positions in the row, ascending.
        places: `(num_tokens,)` index into `computed` of each token's states; -1 where nothing depends on them.
        attended_lengths: `(num_documents,)` tokens of each document that attention sees, all above 0.
    """

    computed: Any
    places: Any
    attended_lengths: Any

    def to_batch(self) -> dict[str, torch.Tensor]:
        """As tensors of a batch, under the names of the attributes."""
        return {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)}


SHARED_KEYS = tuple(field.name for field in fields(SharedTokens))


def without_sharing(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch for a model that is to compute all tokens."""
    return {name: value for name, value in batch.items() if name not in SHARED_KEYS}


def share_tokens(input_ids: Array, labels: Array, lengths: Array, weights: Array | None = None) -> SharedTokens | None:
    """Plan which tokens of a flat row are computed.

    Args:
        input_ids: `(num_tokens,)`.
        labels: `(num_tokens,)`, the first of each document ignored.
        lengths: `(num_documents,)` tokens of each document.
        weights: `(num_tokens,)` factor of each label's loss; tokens that weigh 0 are no targets.

    Returns:
        The plan; None where every token must be computed, or the row has no target.
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
    """Position of the last target in a document, which is how many tokens stand before it; 0 without targets."""
    found = np.flatnonzero(targets)
    return int(found[-1]) if len(found) else 0


def _owners(input_ids: Array, documents: list[slice]) -> Array:
    """For each token the position whose states are its own too; -1 outside of the documents.

    Documents in lexicographic order share most with their neighbours, as in a trie.
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
    """The same for attention: documents whole, one after the other, are `attended` tokens.

    Attributes:
        sources: `(num_attended,)` index of each attended token among the computed ones.
        kept: `(num_computed,)` attended token that each computed one is.
        copies: the attended tokens that are no computed one of their own.
    """

    sources: torch.Tensor
    kept: torch.Tensor
    copies: torch.Tensor

    @property
    def num_computed(self) -> int:
        """Tokens that the layers compute."""
        return self.kept.shape[0]

    def whole(self, states: torch.Tensor) -> torch.Tensor:
        """Computed tokens `(1, heads, num_computed, dim)` as whole documents `(1, heads, num_attended, dim)`."""
        output: torch.Tensor = _Whole.apply(states, self)
        return output

    def once(self, states: torch.Tensor) -> torch.Tensor:
        """Of whole documents `(1, num_attended, heads, dim)` the computed tokens `(1, num_computed, heads, dim)`."""
        output: torch.Tensor = _Once.apply(states, self)
        return output


def sharing_of(batch: Mapping[str, Any]) -> Sharing | None:
    """What attention needs to know of a batch's `SharedTokens`; None where it has none, or only cuts documents."""
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


class _Whole(torch.autograd.Function):
    """A gather whose backward pass adds up only what was copied."""

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


class _Once(torch.autograd.Function):
    """A choice without repeats, so that its backward pass only puts things in place."""

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
