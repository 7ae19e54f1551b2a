"""The figures of an evaluation: label, how they are shown, whether more or less is better; stated here alone.

Which `model.metric` figures an evaluation has: known beforehand, so that a wrong gate is refused at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from sft.evaluate.lm_eval import figure_part
from stages.params.tasks import figure_names

if TYPE_CHECKING:
    from stages.params.schema import EvaluateSection

REGRESSION = "regression_"


class Figure(NamedTuple):
    """What is known of a figure by its name.

    Args:
        label: As people read it.
        kind: percent, number or megabytes.
        direction: 1 where more is better, -1 where less is, 0 where nobody knows.
    """

    label: str
    kind: str = "number"
    direction: int = 0


# In the order of the report's table.
FIGURES: dict[str, Figure] = {
    "exact_match": Figure("Exact match", "percent", 1),
    "json_valid": Figure("Valid JSON", "percent", 1),
    "field_f1": Figure("Field F1, mean over rows", "percent", 1),
    "field_f1_micro": Figure("Field F1, all fields pooled", "percent", 1),
    "word_f1": Figure("Word F1", "percent", 1),
    "number_match": Figure("Number match", "percent", 1),
    "regex_match": Figure("Pattern finds the same", "percent", 1),
    "regex_found": Figure("Pattern found", "percent", 1),
    "rouge1": Figure("ROUGE-1", "percent", 1),
    "rouge2": Figure("ROUGE-2", "percent", 1),
    "rougeL": Figure("ROUGE-L", "percent", 1),
    "bleu": Figure("BLEU, 0 to 100", "number", 1),
    "chrf": Figure("chrF, 0 to 100", "number", 1),
    "stop_rate": Figure("Ends by itself", "percent", 1),
    "loss": Figure("Loss, nats per token", "number", -1),
    "perplexity": Figure("Perplexity", "number", -1),
    "kl": Figure("KL from the tuned model, nats per token", "number", -1),
    "token_accuracy": Figure("Token accuracy", "percent", 1),
    "size_mb": Figure("Size on disk", "megabytes", -1),
}

# Of those that are no shares.
RANGES = {
    "loss": (0.0, math.inf),
    "perplexity": (1.0, math.inf),
    "kl": (0.0, math.inf),
    "size_mb": (0.0, math.inf),
    "bleu": (0.0, 100.0),
    "chrf": (0.0, 100.0),
}

# Of lm-eval's tasks: the beginning of a metric's name, which a filter's may follow.
HARNESS = {
    "acc_norm": Figure("accuracy by length", "percent", 1),
    "acc": Figure("accuracy", "percent", 1),
    "exact_match": Figure("exact match", "percent", 1),
    "f1": Figure("F1", "percent", 1),
    "word_perplexity": Figure("perplexity of a word", "number", -1),
    "byte_perplexity": Figure("perplexity of a byte", "number", -1),
    "bits_per_byte": Figure("bits a byte", "number", -1),
    "perplexity": Figure("perplexity", "number", -1),
}

# Of the other stages, which no table shows.
LOWER_ELSEWHERE = (
    "stderr",
    "bits_per_byte",
    "relative_error",
    "dropped",
    "lost",
    "logit_diff",
    "deviation",
    "bad_updates",
)

LOWER = (*(name for name, figure in FIGURES.items() if figure.direction < 0), *LOWER_ELSEWHERE)


def figure_of(name: str) -> Figure:
    """What is known of a figure; a name of one's own is its own label."""
    if name.startswith(REGRESSION):
        label, kind, direction = figure_of(name.removeprefix(REGRESSION))
        return Figure(
            f"General prompts: {label[0].lower() if label[1:2].islower() else label[0]}{label[1:]}", kind, direction
        )
    task, dot, metric = name.partition(".")
    if dot:
        return _of_harness(task, metric)
    return FIGURES.get(name, Figure(name))


def _of_harness(task: str, metric: str) -> Figure:
    for known, (label, kind, direction) in HARNESS.items():
        if metric == known or metric.startswith(f"{known}_"):
            chosen = metric.removeprefix(known).strip("_").replace("_", " ")
            return Figure(f"{task}: {label}{f' ({chosen})' if chosen else ''}", kind, direction)
    return Figure(f"{task}: {metric}")


def range_of(name: str) -> tuple[float, float]:
    """The least and the largest value that a figure can have, by the last part of its name."""
    figure = name.rpartition(".")[2].removeprefix(REGRESSION)
    if figure.startswith("acc"):
        return 0.0, 1.0
    if figure in FIGURES and FIGURES[figure].kind == "percent":
        return 0.0, 1.0
    return RANGES.get(figure, (-math.inf, math.inf))


def in_order(names: set[str]) -> list[str]:
    """Names of figures in the order of the table: known ones, general prompts, others."""
    known = [*FIGURES, *(f"{REGRESSION}{name}" for name in FIGURES)]
    return [name for name in known if name in names] + sorted(names.difference(known))


def lower_is_better(name: str) -> bool:
    """Whether less of a figure is better, by the last part of its name: losses and sizes are, scores are not."""
    last = name.rpartition(".")[2]
    return last in LOWER or last.endswith(tuple(f"_{figure}" for figure in LOWER))


# KL is measured of all others against the tuned model
REFERENCE = "tuned"

LIKELIHOOD = ("loss", "perplexity", "token_accuracy")

MODELS = ("base", "tuned", "merged", "quantized")

# `merge` has proved that the merged model's logits are those of the tuned one, so it need not answer again
ANSWERING = ("base", "tuned", "quantized")

STOP_RATE = "stop_rate"


def metric_names(section: EvaluateSection, *, with_quantized: bool) -> set[str]:
    """Every `model.metric` that `evaluate` will measure.

    Args:
        section: `evaluate` of params.yaml.
        with_quantized: Whether `quantize` makes a model.

    Raises:
        ValueError: A task is unknown.
    """
    models = [model for model in MODELS if with_quantized or model != "quantized"]
    return {f"{model}.{name}" for model in models for name in _names(section, model)}


def open_ended_names(section: EvaluateSection, *, with_quantized: bool) -> list[str]:
    """What names of lm-eval's figures begin with, `model.task.`: which metrics a task has, only lm-eval knows."""
    models = [model for model in ANSWERING if with_quantized or model != "quantized"]
    return [f"{model}.{figure_part(task)}." for model in models for task in section.lm_eval.tasks]


def _names(section: EvaluateSection, model: str) -> list[str]:
    """The figures of one model."""
    kl = [] if model == REFERENCE else ["kl"]
    names = [*LIKELIHOOD, *kl, "size_mb"]
    if model in ANSWERING:
        names += [*figure_names(section.task), STOP_RATE]
    general = section.regression
    if general.path is not None:
        names += [f"{REGRESSION}{name}" for name in ("loss", *kl)]
        if general.task is not None and model in ANSWERING:
            names += [f"{REGRESSION}{name}" for name in (*figure_names(general.task), STOP_RATE)]
    return names
