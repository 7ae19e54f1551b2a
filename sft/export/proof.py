"""Comparison of two models by their logits on the same rows, to prove that one can replace the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft.inner_model import on_model


@dataclass(frozen=True)
class LogitDifference:
    """Difference of the logits of two models, over all positions.

    Args:
        largest: Largest absolute difference of a logit; NaN if any logit is NaN.
        mean: Mean absolute difference.
        top_token_agreement: Share of positions with the same most likely token.
        num_positions: Number of positions compared.
    """

    largest: float
    mean: float
    top_token_agreement: float
    num_positions: int


Row = Sequence[int] | Mapping[str, torch.Tensor]
"""Token ids of a row, or the inputs of a model for one row, such as token ids and images."""


def logits_of(model: Any, rows: Iterable[Row]) -> list[torch.Tensor]:
    """Return the logits of each row, `(length, vocabulary)`, in float32 on the CPU.

    Args:
        model: Causal language model; set to eval mode.
        rows: Rows, `(num_rows, length)`, ragged. Each row is computed separately.
    """
    return list(iterate_logits(model, rows))


def iterate_logits(model: Any, rows: Iterable[Row]) -> Iterator[torch.Tensor]:
    """Yield the logits of each row as `logits_of` returns them, with those of one row in memory at a time."""
    model.eval()
    device = next(model.parameters()).device
    for row in rows:
        inputs = row if isinstance(row, Mapping) else {"input_ids": torch.tensor([list(row)])}
        with torch.no_grad():
            logits = model(**on_model(inputs, model, device), use_cache=False).logits[0]
        yield logits.float().cpu()


def compare_logits(reference: Iterable[torch.Tensor], found: Iterable[torch.Tensor]) -> LogitDifference:
    """Compare the logits of two models on the same rows, from `logits_of` or `iterate_logits`."""
    largest, total, num_logits, num_agreeing, num_positions = 0.0, 0.0, 0, 0, 0
    for ours, theirs in zip(reference, found, strict=True):
        difference = (ours - theirs).abs()
        # torch's max returns NaN if there is one; Python's depends on the order of its arguments
        row_largest = float(difference.max())
        largest = math.nan if math.isnan(row_largest + largest) else max(largest, row_largest)
        total += float(difference.double().sum())
        num_logits += difference.numel()
        num_agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        num_positions += len(ours)
    return LogitDifference(largest, total / num_logits, num_agreeing / num_positions, num_positions)


def check_logits(difference: LogitDifference, tolerance: float, state: str, advice: str = "") -> None:
    """Check that the largest difference is within the tolerance, and not NaN.

    Args:
        difference: From `compare_logits`.
        tolerance: Largest accepted absolute difference of a logit.
        state: State of the model that was compared, for the message.
        advice: What the user can do, for the message.

    Raises:
        ValueError: The difference is larger, or NaN.
    """
    if difference.largest <= tolerance:
        return
    raise ValueError(
        f"The model, {state}, differs from the trained one: logits differ by up to {difference.largest:.3g} (mean "
        f"{difference.mean:.3g}, same top token at {difference.top_token_agreement:.1%} of {difference.num_positions} "
        f"positions), and the tolerance is {tolerance:g}. Nothing was written.{' ' * bool(advice)}{advice}"
    )
