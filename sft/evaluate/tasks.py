"""What generations are scored with, by name: `json`, `text`, `number`, `regex:PATTERN`, `rouge`, `bleu`, `chrf`.

Libraries for ROUGE, BLEU and chrF are imported when their task is used.

Generation metrics on strings: exact match, valid JSON, field F1, word F1, numbers, patterns.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from typing import Any

from sft.evaluate.intervals import Interval, ratio_interval, sums_interval
from sft.suggest import did_you_mean

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


REGEX = "regex:"

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

CORPUS_RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A value over all rows, and its 95 % interval."""

    value: float
    interval: Interval | None = None


def no_figures(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    """For tasks whose figures are all means of row scores."""
    return {}


def check_not_empty(reference: str) -> None:
    """Refuse a reference that nothing can be compared with.

    Raises:
        ValueError: it is blank.
    """
    if not reference.strip():
        raise ValueError("the reference is empty")


def no_scores(prediction: str, reference: str) -> dict[str, float]:
    """For tasks that have figures over all rows only."""
    return {}


@dataclass(frozen=True)
class Task:
    """How generations of one kind are scored.

    Args:
        names: of all figures, those of rows first: known without scoring anything.
        score: (prediction, reference) -> row scores, whose means are figures.
        summarize: (predictions, references) -> figures over all rows that are no mean of row scores.
        check_reference: raises ValueError for a reference that the task can't be scored against.
        needs: packages that must be there.
    """

    names: tuple[str, ...]
    score: Callable[[str, str], dict[str, float]] = no_scores
    summarize: Callable[[Sequence[str], Sequence[str]], dict[str, Figure]] = no_figures
    check_reference: Callable[[str], None] = check_not_empty
    needs: tuple[tuple[str, str], ...] = ()


def join_tasks(tasks: Sequence[Task]) -> Task:
    """Several tasks as one, with the figures of all."""
    return Task(
        tuple(dict.fromkeys(name for task in tasks for name in task.names)),
        functools.partial(_all_scores, tasks),
        functools.partial(_all_figures, tasks),
        functools.partial(_check_all, tasks),
        tuple(dict.fromkeys(need for task in tasks for need in task.needs)),
    )


def find_task(name: str) -> Task:
    """The task that a name stands for.

    Args:
        name: one of `TASKS`, or `regex:` and a pattern, such as `regex:#### (-?[0-9.]+)`.

    Raises:
        ValueError: nothing has this name (the nearest is given), or the pattern is none.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(REGEX):
        try:
            pattern = re.compile(name.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"task {name!r}: not a regular expression: {error}") from None
        if not pattern.pattern:
            raise ValueError(f"task {name!r} has no pattern; write e.g. `regex:#### (-?[0-9.]+)`")
        return Task(
            ("regex_match", "regex_found"),
            functools.partial(_score_regex, pattern),
            check_reference=functools.partial(_check_regex, pattern),
        )
    hint = did_you_mean(name, TASKS, otherwise=f"known: {', '.join(TASKS)}, {REGEX}PATTERN", cutoff=0.5)
    raise ValueError(f"no task is called {name!r}; {hint}")


def check_packages(task: Task) -> None:
    """Look for the packages of a task without importing them.

    Raises:
        ValueError: says what to install.
    """
    missing = [package for module, package in task.needs if find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be installed for this task: pip install {' '.join(missing)}")


def _all_scores(tasks: Sequence[Task], prediction: str, reference: str) -> dict[str, float]:
    return {name: value for task in tasks for name, value in task.score(prediction, reference).items()}


def _all_figures(tasks: Sequence[Task], predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    return {name: figure for task in tasks for name, figure in task.summarize(predictions, references).items()}


def _check_all(tasks: Sequence[Task], reference: str) -> None:
    for task in tasks:
        task.check_reference(reference)


def _score_json(prediction: str, reference: str) -> dict[str, float]:
    return {
        "exact_match": float(exact_match(prediction, reference)),
        "json_valid": float(json_valid(prediction)),
        "field_f1": f1(*field_counts(prediction, reference)),
    }


def _summarize_json(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    counts = [field_counts(*pair) for pair in zip(predictions, references, strict=True)]
    right, total = [2 * right for right, _ in counts], [total for _, total in counts]
    return {"field_f1_micro": Figure(sum(right) / sum(total) if any(total) else 0.0, ratio_interval(right, total))}


def _check_json(reference: str) -> None:
    if not json_valid(reference):
        raise ValueError(
            f"the reference is not JSON, which task json needs: {reference[:80]!r}; fix the row or use task text"
        )


def _score_text(prediction: str, reference: str) -> dict[str, float]:
    return {"exact_match": float(exact_match(prediction, reference)), "word_f1": word_f1(prediction, reference)}


def _score_number(prediction: str, reference: str) -> dict[str, float]:
    return {"number_match": float(last_number(prediction) == last_number(reference))}


def _check_number(reference: str) -> None:
    if last_number(reference) is None:
        raise ValueError(f"the reference holds no number, which task number needs: {reference[:80]!r}")


def _score_regex(pattern: re.Pattern[str], prediction: str, reference: str) -> dict[str, float]:
    found = last_found(pattern, prediction)
    return {"regex_match": float(found == last_found(pattern, reference)), "regex_found": float(found is not None)}


def _check_regex(pattern: re.Pattern[str], reference: str) -> None:
    if last_found(pattern, reference) is None:
        raise ValueError(f"task {REGEX}{pattern.pattern} finds nothing in the reference {reference[:80]!r}")


class _Words:
    """rouge-score's own tokenizer drops every letter outside a to z; this one keeps the words of all scripts."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words."""
        return re.findall(r"\w+", text.lower())


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE_TYPES, tokenizer=_Words())


def _score_rouge(prediction: str, reference: str) -> dict[str, float]:
    return {name: float(score.fmeasure) for name, score in _rouge_scorer().score(reference, prediction).items()}


def _summarize_sacrebleu(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    """BLEU or chrF of the whole set, from 0 to 100.

    sacrebleu's own bootstrap can't average scores that come in two float types and copies all rows a thousand times, so
    only its counts and its formula are used.
    """
    import sacrebleu

    scorer = getattr(sacrebleu, metric)()
    rows = scorer._extract_corpus_statistics(list(predictions), [list(references)])
    interval = sums_interval(rows, functools.partial(_sacrebleu_score, scorer), CORPUS_RESAMPLES)
    value = scorer.corpus_score(list(predictions), [list(references)]).score
    return {metric.lower(): Figure(float(value), interval)}


def _sacrebleu_score(scorer: Any, sums: list[float]) -> float:
    return float(scorer._compute_score_from_stats(sums).score)


SACREBLEU = (("sacrebleu", "sacrebleu"),)

TASKS: Mapping[str, Task] = {
    "json": Task(
        ("exact_match", "json_valid", "field_f1", "field_f1_micro"), _score_json, _summarize_json, _check_json
    ),
    "text": Task(("exact_match", "word_f1"), _score_text),
    "number": Task(("number_match",), _score_number, check_reference=_check_number),
    "rouge": Task(ROUGE_TYPES, _score_rouge, needs=(("rouge_score", "rouge-score"),)),
    "bleu": Task(("bleu",), summarize=functools.partial(_summarize_sacrebleu, "BLEU"), needs=SACREBLEU),
    "chrf": Task(("chrf",), summarize=functools.partial(_summarize_sacrebleu, "CHRF"), needs=SACREBLEU),
}
