"""Intervals and paired tests, compared with values computed by hand."""

from __future__ import annotations

import pytest

from sft.evaluate.intervals import compare_paired, mean_interval, ratio_interval


def test_interval_of_a_share_is_wilsons_and_honest_at_its_ends() -> None:
    assert mean_interval([1.0] * 10) == (pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))
    assert mean_interval([0.0] * 100) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0370, abs=1e-4))
    assert mean_interval([1.0] * 81 + [0.0] * 19) == (pytest.approx(0.7222, abs=1e-4), pytest.approx(0.8749, abs=1e-4))


def test_interval_of_other_scores_is_bootstrapped_and_repeats_itself() -> None:
    few, many = [0.2, 0.8] * 10, [0.2, 0.8] * 200
    low, high = mean_interval(few)
    assert (low, high) == mean_interval(few)
    assert low < 0.5 < high
    assert mean_interval(many)[1] - mean_interval(many)[0] < (high - low) / 2
    assert mean_interval([0.3] * 5) == (pytest.approx(0.3), pytest.approx(0.3))


def test_interval_needs_a_score() -> None:
    with pytest.raises(ValueError, match="at least one score"):
        mean_interval([])


def test_interval_of_a_ratio_weighs_rows_by_what_belongs_to_them() -> None:
    sums, weights = [10.0, 1.0] * 50, [100.0, 1.0] * 50
    low, high = ratio_interval(sums, weights)
    assert low < sum(sums) / sum(weights) < high
    assert high < 0.15  # the mean of the rows' own ratios would be 0.55
    assert ratio_interval([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="2 rows and 1 weights"):
        ratio_interval([1.0, 2.0], [1.0])


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    import numpy as np

    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = mean_interval(list(rng.exponential(1.0, 60)), seed)
        hits += low <= 1.0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_shares_are_compared_by_the_rows_on_which_the_models_part() -> None:
    first, second = [0.0] * 8 + [1.0] * 12, [1.0] * 7 + [0.0] + [1.0] * 12
    result = compare_paired(first, second)
    # seven rows gained, none lost: 2 * (1/2)^7
    assert (result.test, result.p_value) == ("McNemar, exact", pytest.approx(2 / 2**7))
    assert result.difference == pytest.approx(7 / 20)
    assert result.interval[0] < 7 / 20 < result.interval[1]


def test_other_figures_are_compared_by_swapping_models_row_by_row() -> None:
    # all of 2^5 swaps are tried: only two reach a sum of 5
    result = compare_paired([0.2] * 5, [1.2] * 5)
    assert (result.test, result.p_value) == ("paired permutation", pytest.approx(2 / 2**5))
    assert compare_paired([0.2, 0.3], [0.2, 0.3]).p_value == 1.0
    weighted = compare_paired([4.0, 1.0], [2.0, 1.0], weights=[3.0, 1.0])
    assert weighted.difference == pytest.approx(-0.5)


def test_paired_test_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match="same rows of both models, got 1 and 2"):
        compare_paired([1.0], [1.0, 2.0])
