"""Rows unlike the rest of a data set: in length, and in language."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

FAR_OUT = 3.0
MIN_FACTOR = 2.0
"""Rows less than twice as long, or as short, as the middle half are no outliers however alike the others are."""
MIN_ROWS = 20
RARE = 0.01
"""A language is rare when a smaller part of the rows than this is in it."""
MIN_LETTERS, MAX_CHARACTERS = 60, 1000


def length_limits(lengths: Sequence[int]) -> tuple[float, float]:
    """The shortest and the longest length that is no outlier: far-out fences on a log scale (Tukey 1977).

    Args:
        lengths: Lengths of all rows in characters.

    Returns:
        Lower and upper limit; 0 and infinity where there are too few rows to say.
    """
    if len(lengths) < MIN_ROWS:
        return 0.0, float("inf")
    low, high = np.quantile(np.log(np.maximum(lengths, 1)), (0.25, 0.75))
    reach = max(FAR_OUT * (high - low), np.log(MIN_FACTOR))
    return float(np.exp(low - reach)), float(np.exp(high + reach))


def language(text: str) -> str | None:
    """ISO 639-1 code of a text's language (by py3langid, offline); None where there is too little text to tell."""
    beginning = text[:MAX_CHARACTERS]
    if sum(map(str.isalpha, beginning)) < MIN_LETTERS:
        return None
    label, probability = _identifier().classify(beginning)
    return label if probability >= 1.0 - RARE else None


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def rare_languages(languages: Sequence[str | None]) -> Counter[str]:
    """Languages of which there are so few rows that they hardly belong there, with the number of rows."""
    known = Counter(label for label in languages if label is not None)
    total = sum(known.values())
    if total < MIN_ROWS:
        return Counter()
    return Counter({label: count for label, count in known.items() if count < RARE * total})
