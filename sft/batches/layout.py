"""Document lengths of a flat row, which attention, loss and embedding noise read; keys of a batch.

A packed (or padding-free) batch is ONE row with its documents one after another. With documents of 3, 2 and 1 tokens,
a token attends to the positions marked `x` only:

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
    """Lengths of the documents of one flat row.

    Attributes:
        lengths: Tokens of each document that attention sees, in order, each at least 1.
        sharing: How the layers' computed tokens relate to the documents' tokens; None if they are the same.
        cache: Tensors and masks that were made from the lengths, kept for all layers.

    Raises:
        ValueError: There are no documents, or one is empty.
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
        """Number of tokens in all documents."""
        return sum(self.lengths)

    @property
    def num_computed(self) -> int:
        """Number of tokens that the layers compute; beginnings that documents share count once."""
        return self.num_tokens if self.sharing is None else self.sharing.num_computed

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of neighbouring documents of equal length, as (number of documents, their length).

        One attention call computes a run, as a batch.
        """
        runs: list[tuple[int, int]] = []
        for length in self.lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return tuple(runs)

    def boundaries(self, device: torch.device) -> torch.Tensor:
        """Return cumulative lengths from 0, int32 `(num_documents + 1,)`: `cu_seqlens` of variable-length kernels."""
        key = f"boundaries:{device}"
        if key not in self.cache:
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            self.cache[key] = ends.to(device=device, dtype=torch.int32)
        return self.cache[key]

    def document_ids(self, device: torch.device) -> torch.Tensor:
        """Return the number of the document that each token belongs to, int64 `(num_tokens,)`."""
        key = f"document_ids:{device}"
        if key not in self.cache:
            lengths = torch.tensor(self.lengths)
            ids = torch.repeat_interleave(torch.arange(len(self.lengths)), lengths)
            self.cache[key] = ids.to(device)
        return self.cache[key]


class _Current:
    """The current layout; see `document_layout` for why it is global to the process."""

    layout: DocumentLayout | None = None


def as_layout(seq_lengths: Sequence[int] | torch.Tensor | DocumentLayout) -> DocumentLayout:
    """Return a layout from document lengths: a list, an integer tensor `(num_documents,)`, or a layout itself."""
    if isinstance(seq_lengths, DocumentLayout):
        return seq_lengths
    values: Any = seq_lengths.reshape(-1).tolist() if isinstance(seq_lengths, torch.Tensor) else seq_lengths
    return DocumentLayout(tuple(int(length) for length in values))


def batch_layout(batch: Mapping[str, Any]) -> DocumentLayout | None:
    """Return the layout of a collator's batch, or None if the batch is padded.

    Its lengths are `seq_lengths` `(num_documents,)`, or `attended_lengths` if the batch has a `SharedTokens` plan.
    """
    if "attended_lengths" in batch:
        return DocumentLayout(tuple(batch["attended_lengths"].tolist()), sharing_of(batch))
    lengths = batch.get("seq_lengths")
    return None if lengths is None else as_layout(lengths)


def current_layout() -> DocumentLayout | None:
    """Return the layout of the innermost `document_layout` block, or None outside all of them."""
    return _Current.layout


@contextmanager
def document_layout(seq_lengths: Sequence[int] | torch.Tensor | DocumentLayout | None) -> Iterator[None]:
    """Set the document lengths of a flat row for the forward AND the backward pass inside the block.

    The backward pass must be inside the block because gradient checkpointing runs the layers again there. On a GPU this
    happens in a thread of autograd, which reads a global variable but not a context variable.

    Args:
        seq_lengths: Document lengths, whose sum is the length of the row. None for a padded batch, in which each row is
            a document.

    Raises:
        ValueError: There are no documents, or one is empty.
    """
    previous = _Current.layout
    _Current.layout = None if seq_lengths is None else as_layout(seq_lengths)
    try:
        yield
    finally:
        _Current.layout = previous
