"""What is known of one model: figures, intervals, answers; and what changed from one model to another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sft.evaluate.generation import Generation
from sft.evaluate.intervals import Interval, compare_paired, mean_interval, ratio_interval
from sft.evaluate.likelihood import DocumentScores
from sft.evaluate.tasks import Task, mean_scores
from stages.params.figures import REGRESSION, range_of

SECONDS = ("likelihood", "generation")
# (before, after): what training changed, and what quantization did.
COMPARED = (("base", "tuned"), ("tuned", "quantized"))
NORMAL_95 = 1.96
PER_TOKEN = ("loss", "token_accuracy")
# Of general prompts these two would only say again what the loss says.
NOT_OF_GENERAL = ("perplexity", "token_accuracy")


@dataclass
class Measured:
    """What one model did: figures, their intervals, answers with their scores, seconds; sums a document.

    `general` is the same of the general prompts, where there are any; `errors` are standard errors that lm-eval gave.
    """

    figures: dict[str, float]
    documents: DocumentScores
    intervals: dict[str, Interval] = field(default_factory=dict)
    answers: list[Generation] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    general: Measured | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def add_documents(self) -> None:
        """Add intervals of the figures that are means over tokens, and the divergence where it was measured."""
        weights = self.documents.column("num_tokens")
        names = [*PER_TOKEN, *(["kl"] if self.documents.reference is not None else [])]
        for name in names:
            self.intervals[name] = ratio_interval(self.documents.column(name), weights)
        if "kl" in names:
            self.figures["kl"] = sum(self.documents.column("kl")) / sum(weights)
        # exp overflows past 709 nats, which a broken model can reach.
        low, high = (math.exp(bound) if bound < 700 else math.inf for bound in self.intervals["loss"])
        self.intervals["perplexity"] = (low, high)

    def add_answers(self, answers: list[Generation], task: Task, references: Sequence[str]) -> None:
        """Add answers with their scores, the task's figures, the stop rate, and intervals."""
        texts = [answer.text for answer in answers]
        self.answers = answers
        self.scores = [task.score(text, reference) for text, reference in zip(texts, references, strict=True)]
        whole, rows = task.summarize(texts, references), self.rows()
        figures = mean_scores(rows) | {name: figure.value for name, figure in whole.items()}
        self.figures |= {name: figures[name] for name in [*task.names, "stop_rate"]}
        self.intervals |= {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
        self.intervals |= {name: figure.interval for name, figure in whole.items() if figure.interval is not None}

    def add_general(self, general: Measured) -> None:
        """Add what was measured on general prompts, under names of its own."""
        self.general = general
        self.figures |= _of_general(general.figures)
        self.intervals |= _of_general(general.intervals)
        self.seconds["general"] = round(sum(general.seconds[name] for name in SECONDS if name in general.seconds), 1)

    def add_tasks(self, figures: Mapping[str, float], errors: Mapping[str, float]) -> None:
        """Add what lm-eval measured, with the intervals that its standard errors stand for."""
        self.figures |= figures
        self.errors |= errors
        for name, error in errors.items():
            low, high = range_of(name)
            value, spread = figures[name], NORMAL_95 * error
            self.intervals[name] = (max(low, value - spread), min(high, value + spread))

    def with_errors(self) -> dict[str, float]:
        """All figures, and standard errors as figures of their own."""
        return {**self.figures, **{f"{name}_stderr": value for name, value in self.errors.items()}}

    def rows(self) -> list[dict[str, float]]:
        """Scores of every answer, and whether it ended by itself."""
        pairs = zip(self.answers, self.scores, strict=True)
        return [{**scores, "stop_rate": float(answer.stopped)} for answer, scores in pairs]


def _of_general(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{REGRESSION}{name}": value for name, value in values.items() if name not in NOT_OF_GENERAL}


def comparisons(measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Paired tests on the same rows of every two models that are compared: figure -> difference, interval, p-value."""
    pairs = [(a, b) for a, b in COMPARED if a in measured and b in measured]
    return [{"before": a, "after": b, "figures": compare(measured[a], measured[b])} for a, b in pairs]


def compare(first: Measured, second: Measured) -> dict[str, dict[str, Any]]:
    """All figures that both models have for every document or every answer."""
    weights = first.documents.column("num_tokens")
    tests = {
        name: compare_paired(first.documents.column(name), second.documents.column(name), weights) for name in PER_TOKEN
    }
    before, after = first.rows(), second.rows()
    for name in before[0] if before and after else ():
        tests[name] = compare_paired([row[name] for row in before], [row[name] for row in after])
    found = {name: asdict(test) for name, test in tests.items()}
    if first.general is not None and second.general is not None:
        found |= _of_general(compare(first.general, second.general))
    return found
