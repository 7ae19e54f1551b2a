"""Tasks, which score generated answers against references, and the metrics that they use.

Tasks have names: `json`, `text`, `number`, `regex:PATTERN`, `rouge`, `bleu`, `chrf`. The libraries for ROUGE, BLEU and
chrF are imported when their task is used.
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
from sft.untrusted.patterns import PatternError, check_pattern, last_match

# A sign counts only if no word character precedes it: the 3 in "5-3" is not negative.
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")

REGEX = "regex:"

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

CORPUS_RESAMPLES = 1000
"""Number of bootstrap samples for BLEU and chrF."""

SACREBLEU = (("sacrebleu", "sacrebleu"),)
"""(module, package) that BLEU and chrF need."""


@dataclass(frozen=True)
class Figure:
    """Value of a metric over all rows, and its 95 % interval."""

    value: float
    interval: Interval | None = None


def no_figures(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    """Return nothing: default of a task whose figures are all means of row scores."""
    return {}


def check_not_empty(reference: str) -> None:
    """Check that a reference is not empty.

    Raises:
        ValueError: It has no characters but white space.
    """
    if not reference.strip():
        raise ValueError("the reference is empty")


def no_scores(prediction: str, reference: str) -> dict[str, float]:
    """Return nothing: default of a task that has figures over all rows only."""
    return {}


@dataclass(frozen=True)
class Task:
    """Scoring of generated answers.

    Args:
        names: Names of all figures, those of row scores first.
        score: (prediction, reference) -> row scores by name. The means over rows are figures.
        summarize: (predictions, references) -> figures over all rows that are not means of row scores.
        check_reference: Raises ValueError for a reference that answers cannot be scored against.
        needs: (module, package) of each package that must be installed.
    """

    names: tuple[str, ...]
    score: Callable[[str, str], dict[str, float]] = no_scores
    summarize: Callable[[Sequence[str], Sequence[str]], dict[str, Figure]] = no_figures
    check_reference: Callable[[str], None] = check_not_empty
    needs: tuple[tuple[str, str], ...] = ()


def find_task(name: str) -> Task:
    """Return the task of a name.

    Args:
        name: One of `TASKS`, or `regex:` and a pattern, such as `regex:#### (-?[0-9.]+)`.

    Raises:
        ValueError: No task has this name (the message gives the nearest one), or the pattern is invalid.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(REGEX):
        try:
            check_pattern(name.removeprefix(REGEX))
        except PatternError as error:
            raise ValueError(f"task {name!r:.200}: not a regular expression: {error}") from None
        pattern = re.compile(name.removeprefix(REGEX))
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
    """Check that the packages of a task are installed, without importing them.

    Raises:
        ValueError: They are not; the message contains the `pip install` command.
    """
    missing = [package for module, package in task.needs if find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be installed for this task: pip install {' '.join(missing)}")


def join_tasks(tasks: Sequence[Task]) -> Task:
    """Return one task with the figures and checks of several."""
    return Task(
        tuple(dict.fromkeys(name for task in tasks for name in task.names)),
        functools.partial(_all_scores, tasks),
        functools.partial(_all_figures, tasks),
        functools.partial(_check_all, tasks),
        tuple(dict.fromkeys(need for task in tasks for need in task.needs)),
    )


def _all_scores(tasks: Sequence[Task], prediction: str, reference: str) -> dict[str, float]:
    return {name: value for task in tasks for name, value in task.score(prediction, reference).items()}


def _all_figures(tasks: Sequence[Task], predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    return {name: figure for task in tasks for name, figure in task.summarize(predictions, references).items()}


def _check_all(tasks: Sequence[Task], reference: str) -> None:
    for task in tasks:
        task.check_reference(reference)


def mean_scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each score over the rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def json_valid(text: str) -> bool:
    """Return whether a text, surrounding white space aside, is JSON as RFC 8259 defines it (no NaN, no Infinity)."""
    return _parse(text) is not None


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether two answers are the same.

    If both are JSON they are compared as values: key order, white space and 1 against 1.0 make no difference, list
    order and true against 1 do. Otherwise the strings are compared without surrounding white space.
    """
    left, right = _parse(prediction), _parse(reference)
    if left is not None and right is not None:
        return left == right
    return prediction.strip() == reference.strip()


def json_fields(text: str) -> Counter[tuple[str, str]]:
    """Return the leaves of a JSON text as (path, canonical value), e.g. `("items[0].quantity", "2")`.

    List entries are identified by position. An empty object or list is a leaf. Text that is not JSON has no leaves.
    """
    canonical = _parse(text)
    if canonical is None:
        return Counter()
    return Counter(_leaves("", json.loads(canonical)))


def field_counts(prediction: str, reference: str) -> tuple[int, int]:
    """Return how many leaves (see `json_fields`) both texts share, and how many the two texts have in total."""
    predicted, expected = json_fields(prediction), json_fields(reference)
    return (predicted & expected).total(), predicted.total() + expected.total()


def f1(right: int, total: int) -> float:
    """Return F1 from the number of shared items and the total number of items of both sides; 0 if there are none."""
    return 2 * right / total if total else 0.0


def _parse(text: str) -> str | None:
    """Return the canonical form of a JSON text, equal for equal values; None for any other text."""
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


def word_f1(prediction: str, reference: str) -> float:
    """Return F1 over the bags of lower-case words of two texts, as in SQuAD (arXiv:1606.05250) but with articles."""
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, reference))
    return f1((left & right).total(), left.total() + right.total())


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, None if there is none; `1,234.50` is 1234.5, units and currencies are ignored.

    Answers to arithmetic problems end with the result, as in GSM8K (arXiv:2110.14168).
    """
    found = NUMBER.findall(text.replace("−", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def last_found(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the last match of a pattern, or its first group if the pattern has groups; None if there is no match.

    Raises:
        ValueError: The search takes too long, as for patterns that backtrack.
    """
    try:
        found = last_match(pattern.pattern, text)
    except PatternError as error:
        raise ValueError(f"task {REGEX}{pattern.pattern:.200}: {error}, in {text[:80]!r}") from None
    if found is None:
        return None
    whole, groups = found
    return groups[0] if groups else whole


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
        raise ValueError(f"the reference has no number, which task number needs: {reference[:80]!r}")


def _score_regex(pattern: re.Pattern[str], prediction: str, reference: str) -> dict[str, float]:
    found = last_found(pattern, prediction)
    return {"regex_match": float(found == last_found(pattern, reference)), "regex_found": float(found is not None)}


def _check_regex(pattern: re.Pattern[str], reference: str) -> None:
    if last_found(pattern, reference) is None:
        raise ValueError(f"task {REGEX}{pattern.pattern} finds nothing in the reference {reference[:80]!r}")


class _WordTokenizer:
    """Tokenizer for rouge-score that keeps the words of all scripts; its own one drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Return the lower-case words of a text."""
        return re.findall(r"\w+", text.lower())


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE_TYPES, tokenizer=_WordTokenizer())


def _score_rouge(prediction: str, reference: str) -> dict[str, float]:
    return {name: float(score.fmeasure) for name, score in _rouge_scorer().score(reference, prediction).items()}


def _summarize_sacrebleu(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    """Return corpus BLEU or chrF, from 0 to 100.

    sacrebleu's own bootstrap copies all rows for each sample, and fails when scores have two float types. Only its
    counts per row and its formula are used.
    """
    import sacrebleu

    scorer = getattr(sacrebleu, metric)()
    rows = scorer._extract_corpus_statistics(list(predictions), [list(references)])
    interval = sums_interval(rows, functools.partial(_sacrebleu_score, scorer), CORPUS_RESAMPLES)
    value = scorer.corpus_score(list(predictions), [list(references)]).score
    return {metric.lower(): Figure(float(value), interval)}


def _sacrebleu_score(scorer: Any, sums: list[float]) -> float:
    return float(scorer._compute_score_from_stats(sums).score)


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
