"""Generation metrics on strings: exact match, valid JSON, field F1, word F1, numbers, patterns."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

# A sign counts only where no word stands before it: the 3 of "5-3" is not negative.
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")


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
    counts = [field_counts(*pair) for pair in zip(predictions, references, strict=True)]
    right, total = sum(c[0] for c in counts), sum(c[1] for c in counts)
    rows = [f1(*c) for c in counts]
    return {"micro": f1(right, total), "macro": sum(rows) / len(rows)}


def word_f1(prediction: str, reference: str) -> float:
    """F1 over the bags of lower-case words of two texts, as SQuAD scores answers (arXiv:1606.05250), articles kept."""
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, reference))
    return f1((left & right).total(), left.total() + right.total())


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None where there is none; `1,234.50` is 1234.5, units and currencies are passed over.

    Answers to sums end with the result, as GSM8K's do (arXiv:2110.14168).
    """
    found = NUMBER.findall(text.replace("−", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def last_found(pattern: re.Pattern[str], text: str) -> str | None:
    """What a pattern finds last in a text: its first group, or all of it where it has none; None without a find."""
    found = list(pattern.finditer(text))
    return found[-1].group(1 if pattern.groups else 0) if found else None


def mean_scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every score over the rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


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


def field_counts(prediction: str, reference: str) -> tuple[int, int]:
    """How many leaves (`json_fields`) are right, and how many there are in both texts together."""
    predicted, expected = json_fields(prediction), json_fields(reference)
    return (predicted & expected).total(), predicted.total() + expected.total()


def f1(right: int, total: int) -> float:
    """F1 from what is right and what both sides have together; 0 where there is nothing."""
    return 2 * right / total if total else 0.0
