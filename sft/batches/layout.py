"""Which tokens of a flat row belong together: the document lengths that attention, loss and embedding noise share.

A packed (or padding-free) batch is ONE row with its documents one after another. With lengths 3, 2 and 1 a token may
attend to these positions only (`x`), and nothing of the row's other pairs is ever computed:

              a0 a1 a2 b0 b1 c0      position_ids   0 1 2 0 1 0
          a0   x
          a1   x  x
          a2   x  x  x
          b0            x
          b1            x  x
          c0                  x
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from sft.batches.shared_tokens import Sharing, sharing_of

FILLER = "filler"
"""Key of a row that only fills up the last batch (see `sft.train.processes.EvenRows`), and of a batch of such rows."""

SKIP_LOGITS = "skip_logits"
"""Key that transformers' evaluation adds to a batch for Liger's loss, which is not used here."""


@dataclass(frozen=True)
class DocumentLayout:
    """Lengths of the documents of one flat row, in order; every length is at least 1.

    `sharing` says which tokens the layers compute, where that is not all of them; `cache` holds what is made of the
    lengths once for all layers.
    """

    lengths: tuple[int, ...]
    sharing: Sharing | None = field(default=None, compare=False, repr=False)
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("a document layout needs at least one document, found none")
        if min(self.lengths) < 1:
            raise ValueError(f"document lengths must be at least 1, found {min(self.lengths)} in {self.lengths}")

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the whole row."""
        return sum(self.lengths)

    @property
    def num_computed(self) -> int:
        """Tokens that the layers compute: those of the row, beginnings that documents share counted once."""
        return self.num_tokens if self.sharing is None else self.sharing.num_computed

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Neighbours of equal length taken together: (number of documents, their length).

        One attention call serves a whole run, as a batch.
        """
        runs: list[tuple[int, int]] = []
        for length in self.lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return tuple(runs)

    def boundaries(self, device: torch.device) -> torch.Tensor:
        """Cumulative lengths from 0, int32 `(num_documents + 1,)`: the `cu_seqlens` of variable-length kernels."""
        key = f"boundaries:{device}"
        if key not in self.cache:
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            self.cache[key] = ends.to(device=device, dtype=torch.int32)
        return self.cache[key]

    def document_ids(self, device: torch.device) -> torch.Tensor:
        """Number of the document each token belongs to, int64 `(num_tokens,)`."""
        key = f"document_ids:{device}"
        if key not in self.cache:
            lengths = torch.tensor(self.lengths)
            ids = torch.repeat_interleave(torch.arange(len(self.lengths)), lengths)
            self.cache[key] = ids.to(device)
        return self.cache[key]


class _Current:
    """Holder of the layout in force; see `document_layout` for why it is a plain global."""

    layout: DocumentLayout | None = None


def as_layout(seq_lengths: Sequence[int] | torch.Tensor | DocumentLayout) -> DocumentLayout:
    """Make a layout of document lengths given as a list, an integer tensor `(num_documents,)` or a layout."""
    if isinstance(seq_lengths, DocumentLayout):
        return seq_lengths
    values: Any = seq_lengths.reshape(-1).tolist() if isinstance(seq_lengths, torch.Tensor) else seq_lengths
    return DocumentLayout(tuple(int(length) for length in values))


def batch_layout(batch: Mapping[str, Any]) -> DocumentLayout | None:
    """The layout of a collator's batch: its `seq_lengths`, or what its `SharedTokens` leave of them; None if padded."""
    if "attended_lengths" in batch:
        return DocumentLayout(tuple(batch["attended_lengths"].tolist()), sharing_of(batch))
    lengths = batch.get("seq_lengths")
    return None if lengths is None else as_layout(lengths)


def current_layout() -> DocumentLayout | None:
    """The layout set by the innermost `document_layout`, or None outside of any."""
    return _Current.layout


@contextmanager
def document_layout(seq_lengths: Sequence[int] | torch.Tensor | DocumentLayout | None) -> Iterator[None]:
    """Say how the flat row is divided, around its forward AND its backward pass.

    The backward pass is included because gradient checkpointing runs the layers again there; on a GPU that happens in
    a thread of autograd's own, which sees a plain global but not a context variable.

    Args:
        seq_lengths: document lengths, their sum being the row's length; None for a batch that is not flat, whose
            rows are then documents as usual.

    Raises:
        ValueError: there are no documents, or one is empty.
    """
    previous = _Current.layout
    _Current.layout = None if seq_lengths is None else as_layout(seq_lengths)
    try:
        yield
    finally:
        _Current.layout = previous
