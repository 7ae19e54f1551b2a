"""Generation metrics on strings: exact match, valid JSON, field F1; per row, averaged, and with intervals.

Every metric is a mean of row scores between 0 and 1, so that an interval can be drawn for it. The one exception is
`field_f1_micro`, which counts fields over all rows.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NUM_RESAMPLES = 2000
Z95 = 1.959964


@dataclass(frozen=True)
class Task:
    """How generations of one kind are scored.

    Args:
        score: (prediction, reference) -> row scores, each between 0 and 1.
        summarize: (predictions, references) -> figures over all rows that are no mean of row scores.
        check_reference: raises ValueError for a reference that the task can't be scored against.
    """

    score: Callable[[str, str], dict[str, float]]
    summarize: Callable[[Sequence[str], Sequence[str]], dict[str, float]]
    check_reference: Callable[[str], None]


def json_valid(text: str) -> bool:
    """Whether the text, and nothing around it but white space, is JSON as RFC 8259 defines it (no NaN, no Infinity)."""
    return _parse(text) is not None


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same.

    When both are JSON they are compared as values: key order, white space and 1 against 1.0 make no difference, list
    order and true against 1 do. Otherwise the strings are compared with surrounding white space stripped.
    """
    left, right = _parse(prediction), _parse(reference)
    if left is not None and right is not None:
        return left == right
    return prediction.strip() == reference.strip()


def json_fields(text: str) -> Counter[tuple[str, str]]:
    """The leaves of a JSON text as (path, canonical value), e.g. `("items[0].quantity", "2")`.

    Objects and lists are walked down, list entries by position; an empty object or list is a leaf itself. Text that is
    not JSON has no leaves.
    """
    canonical = _parse(text)
    if canonical is None:
        return Counter()
    return Counter(_leaves("", json.loads(canonical)))


def json_field_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 over the leaves (`json_fields`) that prediction and reference share.

    A leaf is right when path and value are both right; a prediction that is not JSON misses all of its reference's
    leaves.

    Returns:
        `micro`: 2 * right / (predicted + expected), counted over all rows, so that long answers weigh more;
        `macro`: the mean of the rows' own F1, so that every row weighs the same.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"need as many predictions as references and at least one, got {len(predictions)} and {len(references)}"
        )
    counts = [_field_counts(*pair) for pair in zip(predictions, references, strict=True)]
    right, total = sum(c[0] for c in counts), sum(c[1] for c in counts)
    rows = [_f1(*c) for c in counts]
    return {"micro": _f1(right, total), "macro": sum(rows) / len(rows)}


def word_f1(prediction: str, reference: str) -> float:
    """F1 over the bags of lower-case words of two texts, as SQuAD scores answers (arXiv:1606.05250), articles kept."""
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, reference))
    return _f1((left & right).total(), left.total() + right.total())


def mean_interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of row scores: how far it would move with other rows of the same kind.

    Shares (all scores 0 or 1) get the Wilson score interval, which stays honest where every row is right or none is;
    other scores get the percentile bootstrap, drawn with the same seed every time.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("an interval needs at least one score")
    if all(score in (0.0, 1.0) for score in scores):
        return _wilson(sum(scores), len(scores))
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(scores, k=len(scores))) / len(scores) for _ in range(NUM_RESAMPLES))
    tail = int(NUM_RESAMPLES * 0.025)
    return means[tail], means[-1 - tail]


def _wilson(num_right: float, num_rows: int) -> tuple[float, float]:
    """Wilson's interval (J. Am. Stat. Assoc. 22, 1927) of a share at 95 %."""
    share, spread = num_right / num_rows, Z95**2 / num_rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every score over the rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def _score_json(prediction: str, reference: str) -> dict[str, float]:
    return {
        "exact_match": float(exact_match(prediction, reference)),
        "json_valid": float(json_valid(prediction)),
        "field_f1": _f1(*_field_counts(prediction, reference)),
    }


def _summarize_json(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {"field_f1_micro": json_field_f1(predictions, references)["micro"]}


def _check_json(reference: str) -> None:
    if not json_valid(reference):
        raise ValueError(
            f"the reference is not JSON, which task json needs: {reference[:80]!r}; fix the row or use task text"
        )


def _score_text(prediction: str, reference: str) -> dict[str, float]:
    return {"exact_match": float(exact_match(prediction, reference)), "word_f1": word_f1(prediction, reference)}


def _summarize_text(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {}


def _check_text(reference: str) -> None:
    if not reference.strip():
        raise ValueError("the reference is empty")


def _parse(text: str) -> str | None:
    """The canonical form of a JSON text, None for anything else; canonical texts are equal when the values are."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return json.dumps(_plain_numbers(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return value


def _leaves(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{path}.{key}" if path else key, item)]
    if isinstance(value, list) and value:
        return [leaf for index, item in enumerate(value) for leaf in _leaves(f"{path}[{index}]", item)]
    return [(path, json.dumps(value, ensure_ascii=False))]


def _field_counts(prediction: str, reference: str) -> tuple[int, int]:
    predicted, expected = json_fields(prediction), json_fields(reference)
    return (predicted & expected).total(), predicted.total() + expected.total()


def _f1(right: int, total: int) -> float:
    return 2 * right / total if total else 0.0


TASKS = {
    "json": Task(_score_json, _summarize_json, _check_json),
    "text": Task(_score_text, _summarize_text, _check_text),
}
