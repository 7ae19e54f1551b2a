"""Results of one model (figures, intervals, answers), and paired comparisons of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sft.evaluate.generation import Generation
from sft.evaluate.intervals import Interval, compare_paired, mean_interval, ratio_interval
from sft.evaluate.likelihood import DocumentScores
from sft.evaluate.tasks import Task, mean_scores
from stages.params.figures import REGRESSION, TEST, range_of

SECONDS = ("likelihood", "generation")
COMPARED = (("base", "tuned"), ("tuned", "quantized"))
"""Pairs (before, after) that are compared: the effects of training and of quantization."""

NORMAL_95 = 1.96

PER_TOKEN = ("loss", "token_accuracy")

NOT_OF_OTHERS = ("perplexity", "token_accuracy")
"""Figures that are not reported for test rows and general prompts, as they follow from the loss."""


@dataclass
class ModelResult:
    """Results of one model on one set of rows.

    Args:
        figures: Name -> value.
        documents: Sums for each document.
        intervals: Name of a figure -> its 95 % interval.
        answers: Generated answers, one for each prompt.
        scores: Name -> score, one dict for each answer.
        seconds: Name -> wall time in seconds, or speed.
        others: Prefix of figures -> results on other rows: general prompts, test rows.
        errors: Name of a figure -> standard error as lm-eval reports it.
    """

    figures: dict[str, float]
    documents: DocumentScores
    intervals: dict[str, Interval] = field(default_factory=dict)
    answers: list[Generation] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    others: dict[str, ModelResult] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def summed(self) -> list[str]:
        """Figures of which the documents have a sum over their tokens."""
        return [*PER_TOKEN, *(["kl"] if self.documents.reference is not None else [])]

    def add_documents(self) -> None:
        """Add the intervals of figures that are means over tokens, and the KL divergence if it was measured."""
        weights, names = self.documents.column("num_tokens"), self.summed
        for name in names:
            self.intervals[name] = ratio_interval(self.documents.column(name), weights)
        if "kl" in names:
            self.figures["kl"] = sum(self.documents.column("kl")) / sum(weights)
        # exp overflows above 709 nats, which a broken model can reach
        low, high = (math.exp(bound) if bound < 700 else math.inf for bound in self.intervals["loss"])
        self.intervals["perplexity"] = (low, high)

    def add_answers(self, answers: list[Generation], task: Task, references: Sequence[str]) -> None:
        """Add answers with their scores, and the figures of the task and the stop rate with their intervals.

        Args:
            answers: Generated answers.
            task: The task that scores them.
            references: Expected answers.
        """
        texts = [answer.text for answer in answers]
        self.answers = answers
        self.scores = [task.score(text, reference) for text, reference in zip(texts, references, strict=True)]
        whole, rows = task.summarize(texts, references), self.rows()
        figures = mean_scores(rows) | {name: figure.value for name, figure in whole.items()}
        self.figures |= {name: figures[name] for name in [*task.names, "stop_rate"]}
        self.intervals |= {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
        self.intervals |= {name: figure.interval for name, figure in whole.items() if figure.interval is not None}

    def add_others(self, prefix: str, others: ModelResult) -> None:
        """Add the results on other rows, with their figures under prefixed names."""
        self.others[prefix] = others
        self.figures |= _prefixed(prefix, others.figures)
        self.intervals |= _prefixed(prefix, others.intervals)
        seconds = round(sum(others.seconds[name] for name in SECONDS if name in others.seconds), 1)
        self.seconds[{REGRESSION: "general", TEST: "test"}[prefix]] = seconds

    def add_tasks(self, figures: Mapping[str, float], errors: Mapping[str, float]) -> None:
        """Add the figures of lm-eval, with 95 % intervals from its standard errors.

        Args:
            figures: Name -> value.
            errors: Name -> standard error, for figures that have one.
        """
        self.figures |= figures
        self.errors |= errors
        for name, error in errors.items():
            low, high = range_of(name)
            value, spread = figures[name], NORMAL_95 * error
            self.intervals[name] = (max(low, value - spread), min(high, value + spread))

    def with_errors(self) -> dict[str, float]:
        """Return all figures, and standard errors as `<figure>_stderr`."""
        return {**self.figures, **{f"{name}_stderr": value for name, value in self.errors.items()}}

    def rows(self) -> list[dict[str, float]]:
        """Return the scores of each answer, and as `stop_rate` whether the model ended it (1.0) or the limit (0.0)."""
        pairs = zip(self.answers, self.scores, strict=True)
        return [{**scores, "stop_rate": float(answer.stopped)} for answer, scores in pairs]


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items() if name not in NOT_OF_OTHERS}


def comparisons(measured: Mapping[str, ModelResult]) -> list[dict[str, Any]]:
    """Compare all pairs of models in `COMPARED` that were measured.

    Args:
        measured: Model -> its results on the same rows.

    Returns:
        One entry per pair: `before`, `after`, and `figures` as `compare` returns them.
    """
    pairs = [(a, b) for a, b in COMPARED if a in measured and b in measured]
    return [{"before": a, "after": b, "figures": compare(measured[a], measured[b])} for a, b in pairs]


def compare(first: ModelResult, second: ModelResult) -> dict[str, dict[str, Any]]:
    """Run paired tests of two models on the same documents and answers.

    Args:
        first: Results of the model before.
        second: Results of the model after.

    Returns:
        Figure -> difference, interval and p-value.
    """
    weights = first.documents.column("num_tokens")
    tests = {
        name: compare_paired(first.documents.column(name), second.documents.column(name), weights) for name in PER_TOKEN
    }
    before, after = first.rows(), second.rows()
    for name in before[0] if before and after else ():
        tests[name] = compare_paired([row[name] for row in before], [row[name] for row in after])
    found = {name: asdict(test) for name, test in tests.items()}
    for prefix in first.others.keys() & second.others.keys():
        found |= _prefixed(prefix, compare(first.others[prefix], second.others[prefix]))
    return found
