"""What a model does on each document: loss, right tokens, and divergence from another model, without a second pass.

Intervals and paired tests draw documents, so they need figures a document. The divergence KL(reference || model) is
taken over the reference's `NUM_KEPT` likeliest tokens and one class for all others: 0.5 kB a token are kept instead of
a whole vocabulary. By the data processing inequality it is never above the divergence over the vocabulary, and it
equals it where the model shares out what is left as the reference does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from sft.evaluate.likelihood import Document

NUM_KEPT = 64


@dataclass(frozen=True)
class Kept:
    """The likeliest tokens of a document, `(num_supervised, NUM_KEPT)`, their logits, and that of all others."""

    tokens: torch.Tensor
    logits: torch.Tensor
    rest: torch.Tensor


@dataclass
class DocumentScores:
    """Collects sums a document; its `add` is `evaluate_model`'s `on_logits`.

    Args:
        reference: what another model's `kept` holds after the same rows; None = no divergence is measured.
        keep: whether to keep this model's likeliest tokens, for others to be measured against.
    """

    reference: dict[int, Kept] | None = None
    keep: bool = False
    kept: dict[int, Kept] = field(default_factory=dict)
    _sums: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, documents: Sequence[Document], logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            documents: of the batch.
            logits: `(num_supervised, vocabulary)`, documents one behind the other.
            targets: `(num_supervised,)`.
        """
        counts = [len(document.supervised) for document in documents]
        losses = cross_entropy(logits, targets, reduction="none").double().split(counts)
        hits = (logits.argmax(-1) == targets).split(counts)
        for document, scores, loss, hit in zip(documents, logits.split(counts), losses, hits, strict=True):
            sums = {"num_tokens": float(len(loss)), "loss": float(loss.sum()), "token_accuracy": float(hit.sum())}
            if self.reference is not None:
                sums["kl"] = float(divergence(self.reference[document.index], scores).sum())
            if self.keep:
                self.kept[document.index] = keep_likeliest(scores)
            self._sums[document.index] = sums

    def column(self, name: str) -> list[float]:
        """One number a document, in their order: `num_tokens`, or the sum of a figure over its tokens."""
        return [self._sums[index][name] for index in sorted(self._sums)]


def keep_likeliest(logits: torch.Tensor) -> Kept:
    """The part of logits `(n, vocabulary)` that a divergence needs, on the CPU."""
    values, tokens = logits.topk(min(NUM_KEPT, logits.shape[-1]), dim=-1)
    return Kept(tokens.to("cpu", torch.int32), values.cpu(), _rest(logits, tokens).cpu())


def divergence(reference: Kept, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) in nats at each position `(n,)`, in float64.

    Args:
        reference: what the other model holds likely.
        logits: of this model, `(n, vocabulary)`.

    Raises:
        ValueError: the reference was made at other positions.
    """
    tokens = reference.tokens.to(logits.device, torch.long)
    if len(tokens) != len(logits):
        raise ValueError(f"a divergence needs the same positions of both models, got {len(tokens)} and {len(logits)}")
    ours = _log_probabilities(logits.gather(-1, tokens).cpu(), _rest(logits, tokens).cpu())
    theirs = _log_probabilities(reference.logits, reference.rest)
    # Where the reference sees no chance at all, 0 * log 0 counts as 0.
    parts = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
    return parts.sum(-1)


def _rest(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logit of all tokens but some, taken as one, summed itself: 1 minus the others would be noise."""
    return logits.scatter(-1, tokens, -torch.inf).logsumexp(-1)


def _log_probabilities(logits: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits.double(), rest.double()[:, None]], dim=-1).log_softmax(-1)
