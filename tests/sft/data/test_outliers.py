"""Outliers in length and rare languages are found, if there are enough rows to compare with."""

from __future__ import annotations

import numpy as np

from sft.data.similarity import language, length_limits, rare_languages


def test_only_lengths_far_from_the_others_are_outside() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 0.8, 5000).astype(int).tolist()
    shortest, longest = length_limits(lengths)
    assert all(shortest <= length <= longest for length in lengths)
    assert longest < 1_000_000
    assert length_limits([100] * 50) == (50.0, 200.0) or np.allclose(length_limits([100] * 50), (50, 200))
    assert length_limits([1, 1000]) == (0.0, float("inf"))


def test_a_language_is_rare_when_hardly_any_row_is_in_it() -> None:
    english = "The weather in this town is usually quite mild in spring, and it rains a lot in the autumn months."
    german = "Das Wetter in dieser Stadt ist im Frühling meist recht mild, und im Herbst regnet es sehr häufig."
    assert (language(english), language(german), language("Ja.")) == ("en", "de", None)
    assert rare_languages(["en"] * 199 + ["de", None]) == {"de": 1}
    assert rare_languages(["en"] * 50 + ["de"] * 50) == {}
    assert rare_languages(["en", "de"]) == {}
