"""Recorded distributions of another model as targets: cross entropy towards them, whose gradient is that of the KL.

A `Teacher` holds the most likely tokens of a model at some positions of the training rows, recorded before training, so
that no second model is needed while training. The tokens that are not recorded count as one class, as in
`sft.evaluate.likelihood.divergence`. The cross entropy towards such a distribution is the KL divergence from it plus
its entropy, which does not depend on the trained model (distillation, Hinton et al., arXiv:1503.02531).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

LEAST_REST = 1e-6
"""Least probability of the tokens that are not recorded: below it, float32 sums of all others are inexact."""


@dataclass(frozen=True)
class SoftTargets:
    """Distributions that some rows of logits are trained towards.

    Attributes:
        rows: `(num_soft,)` rows of the logits, ascending.
        tokens: `(num_soft, kept)` int64 ids of the recorded tokens.
        probabilities: `(num_soft, kept)` of these tokens; what is missing to 1 belongs to all others together.
        share: Share of the row's loss that the distribution has, from 0 to 1; the target has the rest.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor
    share: float

    def within(self, rows: slice) -> SoftTargets | None:
        """Return those of a chunk of rows, counted from its beginning; None if there are none."""
        first, last = torch.searchsorted(self.rows, torch.tensor([rows.start, rows.stop], device=self.rows.device))
        if first == last:
            return None
        chosen = slice(int(first), int(last))
        return replace(
            self,
            rows=self.rows[chosen] - rows.start,
            tokens=self.tokens[chosen],
            probabilities=self.probabilities[chosen],
        )

    def losses(self, logits: torch.Tensor, normalizers: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of each row towards its distribution, `(num_soft,)`.

        Args:
            logits: `(num_soft, kept)` of the recorded tokens, less the row's largest logit.
            normalizers: `(num_soft, 1)` sum of `exp(logit - largest)` over the vocabulary.
        """
        probabilities = self.probabilities.to(logits.dtype)
        rest = _rest(normalizers, logits.exp())
        known = (probabilities * logits).sum(-1)
        return normalizers.log().squeeze(-1) - known - self._missing(probabilities) * rest.log().squeeze(-1)

    def reweighted(self, exponentials: torch.Tensor, normalizers: torch.Tensor) -> torch.Tensor:
        """Return exponentials from which a softmax gives the gradient, except for the part of the target.

        With `q` the softmax and `p` the distribution, that gradient is `q - share * p` for a recorded token and
        `q - share * p_rest * q / q_rest` for another one.

        Args:
            exponentials: `(num_soft, vocab)`, `exp(logit - largest)`.
            normalizers: `(num_soft, 1)` their sums.
        """
        probabilities = self.probabilities.to(exponentials.dtype)
        recorded = exponentials.gather(-1, self.tokens)
        missing = self._missing(probabilities)[:, None]
        others = 1 - self.share * missing * normalizers / _rest(normalizers, recorded)
        changed = recorded - self.share * probabilities * normalizers
        return (exponentials * others).scatter(-1, self.tokens, changed)

    def _missing(self, probabilities: torch.Tensor) -> torch.Tensor:
        return (1 - probabilities.sum(-1)).clamp_min(0)


def _rest(normalizers: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """Return the sum of the exponentials of the tokens that are not recorded, `(num_soft, 1)`, above 0."""
    rest = normalizers - recorded.sum(-1, keepdim=True)
    return torch.maximum(rest, LEAST_REST * normalizers)


@dataclass(frozen=True)
class Teacher:
    """Recorded distributions, which tokens of the training rows refer to by number (column `teacher_rows`).

    Attributes:
        tokens: `(num_recorded, kept)` int32 ids of the most likely tokens.
        probabilities: `(num_recorded, kept)` of these tokens.
        share: Share of the loss of those tokens that the distributions have, from 0 to 1.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor
    share: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"the share of a teacher's distributions must be from 0 to 1, found {self.share}")

    def targets(self, recorded: torch.Tensor) -> SoftTargets | None:
        """Return the distributions of a batch's targets; None if no target has one.

        Args:
            recorded: `(num_targets,)` number of each target's distribution; -1 = none.
        """
        rows = (recorded >= 0).nonzero().squeeze(1)
        if not len(rows) or not self.share:
            return None
        chosen = recorded[rows].cpu()
        tokens = self.tokens[chosen].to(recorded.device, torch.int64)
        return SoftTargets(rows, tokens, self.probabilities[chosen].to(recorded.device), self.share)
