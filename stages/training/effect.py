"""Whether a training had an effect: untrained parameters, and a loss that does not move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import kendalltau

from sft.optimizers.untrained import UNTRAINED

History = Sequence[Mapping[str, Any]]

FLAT = 1e-3
"""Held-out losses that differ by less than this share of their mean have not moved."""

MIN_POINTS, P_VALUE = 10, 0.05
"""Points of the training loss that are needed to look for a trend, and the p-value above which there is none."""


def effect_record(history: History) -> dict[str, Any]:
    """Return what a training left untrained and whether its loss stood still, for outs/train/effect.json.

    Args:
        history: The trainer's log.
    """
    untrained = [{"step": entry["step"], **row} for entry in history for row in entry.get(UNTRAINED, ())]
    return {"untrained": untrained, "flat_loss": flat_loss(history)}


def flat_loss(history: History) -> dict[str, Any] | None:
    """Return between which steps and values a loss stood still; None if it moved, or if there are too few points.

    Held-out losses decide, since all evaluations have the same rows. Where there is only one, a trend of the training
    losses is looked for by Kendall's rank correlation.
    """
    evaluated, trained = _points(history, "eval_loss"), _points(history, "loss")
    if len(evaluated) > 1:
        values = list(evaluated.values())
        is_flat = max(values) - min(values) <= FLAT * abs(sum(values) / len(values))
        return _record("eval_loss", evaluated) if is_flat else None
    if len(trained) < MIN_POINTS:
        return None
    values = list(trained.values())
    is_flat = min(values) == max(values) or kendalltau(list(trained), values).pvalue > P_VALUE
    return _record("loss", trained) if is_flat else None


def _points(history: History, figure: str) -> dict[int, float]:
    return {entry["step"]: float(entry[figure]) for entry in history if figure in entry}


def _record(figure: str, points: Mapping[int, float]) -> dict[str, Any]:
    first, last, lowest, highest = min(points), max(points), min(points.values()), max(points.values())
    what = {"eval_loss": "held-out loss stays", "loss": "training loss has no trend: it stays"}[figure]
    return {
        "figure": figure,
        "first_step": first,
        "last_step": last,
        "lowest": lowest,
        "highest": highest,
        "sentence": f"The {what} between {lowest:.4f} and {highest:.4f} from step {first} to {last}.",
    }
