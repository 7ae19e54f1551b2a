"""Compare two models by their logits on the same rows: the proof that one stands for the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LogitDifference:
    """How far two models are apart, over all positions.

    Args:
        largest: Largest absolute difference of a logit; NaN when any logit is.
        mean: Mean absolute difference.
        top_token_agreement: Share of positions with the same most likely token.
        num_positions: Positions compared.
    """

    largest: float
    mean: float
    top_token_agreement: float
    num_positions: int


def logits_of(model: Any, rows: Iterable[Sequence[int]]) -> list[torch.Tensor]:
    """Logits (length, vocabulary) of each row by itself, in float32 on the CPU."""
    return list(iterate_logits(model, rows))


def iterate_logits(model: Any, rows: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
    """What `logits_of` gives, one row after the other."""
    model.eval()
    device = next(model.parameters()).device
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(row)], device=device), use_cache=False).logits[0]
        yield logits.float().cpu()


def compare_logits(reference: Iterable[torch.Tensor], found: Iterable[torch.Tensor]) -> LogitDifference:
    """Compare what `logits_of` or `iterate_logits` gave for two models."""
    largest, total, num_logits, num_agreeing, num_positions = 0.0, 0.0, 0, 0, 0
    for ours, theirs in zip(reference, found, strict=True):
        difference = (ours - theirs).abs()
        # torch's max gives NaN if there is one; Python's keeps whichever comes first
        row_largest = float(difference.max())
        largest = math.nan if math.isnan(row_largest + largest) else max(largest, row_largest)
        total += float(difference.double().sum())
        num_logits += difference.numel()
        num_agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        num_positions += len(ours)
    return LogitDifference(largest, total / num_logits, num_agreeing / num_positions, num_positions)


def check_logits(difference: LogitDifference, tolerance: float, state: str, advice: str = "") -> None:
    """Refuse a difference that is past the tolerance, or not a number.

    Args:
        state: What was compared, for the message.
        advice: What the user can do about it, for the message.
    """
    if difference.largest <= tolerance:
        return
    raise ValueError(
        f"The model, {state}, is not the one that was trained: logits differ by up to {difference.largest:.3g} (mean "
        f"{difference.mean:.3g}, same top token at {difference.top_token_agreement:.1%} of {difference.num_positions} "
        f"positions), and the tolerance is {tolerance:g}. Nothing was written.{' ' * bool(advice)}{advice}"
    )
