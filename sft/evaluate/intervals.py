"""95 % confidence intervals of figures, and paired tests of two models on the same rows.

The bootstrap (Efron, Ann. Statist. 7, 1979) draws rows, not tokens, since the tokens of one answer are not independent.
All draws are seeded, so that results are reproducible to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CHUNK = 2_000_000
"""Largest number of rows drawn at a time, to limit memory for long lists."""

Z95 = 1.959964
"""97.5 % quantile of the standard normal distribution."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """Difference of a figure between two models on the same rows.

    Args:
        difference: Second model minus first.
        interval: 95 % interval of the difference.
        p_value: Probability of a difference at least this large if the models were equally good.
        test: Name of the test that gave the p-value.
    """

    difference: float
    interval: Interval
    p_value: float
    test: str


def mean_interval(scores: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % interval of the mean of row scores.

    Shares (all scores 0 or 1) get the Wilson score interval, which has the right coverage also if all rows or none are
    correct. Other scores get the percentile bootstrap.

    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError("an interval needs at least one score")
    if _is_share(scores):
        return _wilson(sum(scores), len(scores))
    return ratio_interval(scores, [1.0] * len(scores), seed)


def ratio_interval(sums: Sequence[float], weights: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % percentile bootstrap interval of `sum(sums) / sum(weights)`, drawing rows with their weights.

    Args:
        sums: One number per row, such as the summed loss of its tokens.
        weights: Weight of each row, such as the number of its tokens.
        seed: Seed of the draws.

    Raises:
        ValueError: The lists are empty or differ in length.
    """
    if not sums or len(sums) != len(weights):
        raise ValueError(f"an interval needs rows with a weight each, got {len(sums)} rows and {len(weights)} weights")
    table = np.array([sums, weights], dtype=np.float64)
    rng, count = np.random.default_rng(seed), len(sums)
    ratios: list[np.ndarray] = []
    for start in range(0, NUM_RESAMPLES, step := max(1, CHUNK // count)):
        drawn = table[:, rng.integers(0, count, (min(step, NUM_RESAMPLES - start), count))].sum(-1)
        # A draw whose weights sum to 0 has no ratio; it counts as 0, as the figure itself does.
        ratios.append(np.divide(drawn[0], drawn[1], out=np.zeros(drawn.shape[1]), where=drawn[1] != 0))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def sums_interval(
    rows: Sequence[Sequence[float]], figure: Callable[[list[float]], float], num_resamples: int, seed: int = 0
) -> Interval:
    """Return the 95 % percentile bootstrap interval of a figure that is computed from sums over rows, such as BLEU.

    Args:
        rows: Counts, `(num_rows, num_counts)`.
        figure: Function from the sums over rows, `(num_counts,)`, to the figure.
        num_resamples: Number of bootstrap samples; `figure` is called once for each.
        seed: Seed of the draws.
    """
    table, rng = np.array(rows, dtype=np.float64), np.random.default_rng(seed)
    figures = [
        float(figure(table[rng.integers(0, len(rows), len(rows))].sum(0).tolist())) for _ in range(num_resamples)
    ]
    low, high = np.quantile(figures, [0.025, 0.975])
    return float(low), float(high)


def compare_paired(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Paired:
    """Test whether two models differ on the same rows.

    Shares get McNemar's exact test on the rows where only one model is right (Psychometrika 12, 1947), other figures a
    permutation test that swaps the two models in random rows. The interval is that of the paired bootstrap.

    Args:
        first: One number per row, of the first model.
        second: Numbers of the second model for the same rows.
        weights: Weight of each row, by whose sum the differences are divided; None for equal weights, which gives
            means.
        seed: Seed of the draws.

    Raises:
        ValueError: The lists are empty or differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"a paired test needs the same rows of both models, got {len(first)} and {len(second)}")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    interval = ratio_interval(differences, weights or [1.0] * len(differences), seed)
    difference = sum(differences) / sum(weights or [len(differences)])
    if weights is None and _is_share([*first, *second]):
        return Paired(difference, interval, _mcnemar(differences), "McNemar, exact")
    return Paired(difference, interval, _swap_models(differences, seed), "paired permutation")


def _mcnemar(differences: Sequence[float]) -> float:
    from scipy.stats import binomtest

    gained, lost = differences.count(1.0), differences.count(-1.0)
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _swap_models(differences: Sequence[float], seed: int) -> float:
    from scipy.stats import permutation_test

    if not any(differences):
        return 1.0
    result = permutation_test(
        (np.array(differences),),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES * 5 - 1,
        batch=max(1, CHUNK // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _is_share(scores: Sequence[float]) -> bool:
    return all(score in (0.0, 1.0) for score in scores)


def _wilson(num_right: float, num_rows: int) -> Interval:
    """Return the 95 % Wilson score interval (J. Am. Stat. Assoc. 22, 1927) of a share."""
    share, spread = num_right / num_rows, Z95**2 / num_rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
