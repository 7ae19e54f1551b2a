"""Evidence for conditions of the gate: the 95 % interval of an expression of measured figures.

The interval of an expression is recovered from the intervals of its figures (MOVER: Zou and Donner, Statist. Med. 27,
2008). For the difference of two paired shares with Wilson intervals, that is Newcombe's interval (Statist. Med. 17,
1998, method 10). Products and quotients are replaced by their tangent at the measured values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sft.evaluate.intervals import Interval

MIN_ROWS = 20
"""Fewest rows of which a figure shows anything: intervals of fewer rows are too uncertain themselves."""

RELATIVE_STEP = 1e-4
"""Step of the numeric derivative, relative to the figure."""


@dataclass(frozen=True)
class Measured:
    """How certain a figure is.

    Args:
        interval: Its 95 % interval.
        num_rows: Number of rows that it was measured on; None if unknown.
        rows: Key of a row -> the row's part in the deviation of the figure, by which figures of the same rows are
            correlated; empty if unknown.
    """

    interval: Interval
    num_rows: int | None = None
    rows: Mapping[str, float] | None = None


Evidence = Mapping[str, Measured]
"""`model.metric` -> how certain it is. Figures that are not in it, such as sizes, are exact."""


def mean_parts(scores: Mapping[str, float], weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return each row's part in the deviation of `sum(scores) / sum(weights)` from its expectation.

    Args:
        scores: Key of a row -> its score, or its sum over tokens.
        weights: Key of a row -> its weight, such as the number of its tokens; None = 1.
    """
    total = sum(weights.values()) if weights else len(scores)
    ratio = sum(scores.values()) / total if total else 0.0
    return {key: score - ratio * (weights[key] if weights else 1.0) for key, score in scores.items()}


def expression_interval(
    value: Callable[[Mapping[str, float]], float], figures: Mapping[str, float], evidence: Evidence
) -> Interval:
    """Return the 95 % interval of an expression.

    Args:
        value: Function from figures to the value of the expression.
        figures: `model.metric` -> value, of the figures in the expression.
        evidence: How certain the figures are.
    """
    centre = value(figures)
    slopes, below, above = {}, {}, {}
    for name, figure in figures.items():
        if name not in evidence:
            continue
        low, high = evidence[name].interval
        down, up = max(0.0, figure - low), max(0.0, high - figure)
        slopes[name] = _slope(value, figures, name)
        if slopes[name] < 0:
            down, up = up, down
        below[name], above[name] = abs(slopes[name]) * down, abs(slopes[name]) * up
    return centre - _combine(below, slopes, evidence), centre + _combine(above, slopes, evidence)


def too_few_rows(names: Sequence[str], evidence: Evidence) -> int | None:
    """Return the smallest number of rows that one of the figures was measured on, if it is below `MIN_ROWS`."""
    counts = [evidence[name].num_rows for name in names if name in evidence]
    fewest = min((count for count in counts if count is not None), default=MIN_ROWS)
    return fewest if fewest < MIN_ROWS else None


def correlation(first: Measured, second: Measured) -> float:
    """Return the correlation of two figures over the rows that both were measured on; 0 if it is unknown."""
    common = sorted(set(first.rows or ()) & set(second.rows or ()))
    if len(common) < 2 or first.rows is None or second.rows is None:
        return 0.0
    a, b = (np.array([rows[key] for key in common]) for rows in (first.rows, second.rows))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else 0.0


def _slope(value: Callable[[Mapping[str, float]], float], figures: Mapping[str, float], name: str) -> float:
    step = RELATIVE_STEP * max(abs(figures[name]), 1e-3)
    right, left = (value({**figures, name: figures[name] + sign * step}) for sign in (1, -1))
    return (right - left) / (2 * step)


def _combine(distances: Mapping[str, float], slopes: Mapping[str, float], evidence: Evidence) -> float:
    """Return the distance of the expression to its limit from the distances of its figures to theirs."""
    if not all(map(math.isfinite, distances.values())):
        return math.inf
    square = sum(distance**2 for distance in distances.values())
    for one, other in itertools.combinations(distances, 2):
        sign = math.copysign(1.0, slopes[one]) * math.copysign(1.0, slopes[other])
        shared = correlation(evidence[one], evidence[other])
        square += 2 * sign * shared * distances[one] * distances[other]
    return math.sqrt(max(0.0, square))
