"""The figures of an evaluation: which ones each model has, and the label, range and direction of each.

Names of figures are known before anything is computed, so that a gate with a wrong name is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.evaluate.lm_eval import figure_part
from stages.params.tasks import figure_names

if TYPE_CHECKING:
    from stages.params.schema import EvaluateSection

MODELS = ("base", "tuned", "merged", "quantized")

REFERENCE = "tuned"
"""The model from which the KL divergence of the others is measured."""

ANSWERING = ("base", "tuned", "quantized")
"""Models that generate answers. `merge` has proved that the merged model's logits equal those of the tuned one."""

LIKELIHOOD = ("loss", "perplexity", "token_accuracy")
STOP_RATE = "stop_rate"

ENGINE = "engine"
"""First part of the names of serving engines' figures."""

EQUAL_ANSWERS, SAME_PROMPTS = "equal_answers", "same_prompts"
"""Figures of engines: shares of answers that equal the evaluated ones, and of prompts read as the same tokens."""

REGRESSION = "regression_"
"""Prefix of the figures of general prompts."""

TEST = "test_"
"""Prefix of the figures of the test rows, which no one looks at while developing."""

PREFIXES = (REGRESSION, TEST)
"""Prefixes of the figures of rows other than the held-out ones."""


VERDICTS = {"shown": "holds", "not shown": "not shown", "failed": "FAILS"}
"""Verdict on a condition of the gate -> its word in a terminal."""


class Figure(NamedTuple):
    """How a figure is shown and compared.

    Args:
        label: Name for readers.
        kind: percent, number or megabytes.
        direction: 1 if more is better, -1 if less is better, 0 if that is unknown.
    """

    label: str
    kind: str = "number"
    direction: int = 0


FIGURES: dict[str, Figure] = {
    "exact_match": Figure("Exact match", "percent", 1),
    "json_valid": Figure("Valid JSON", "percent", 1),
    "field_f1": Figure("Field F1, mean over rows", "percent", 1),
    "field_f1_micro": Figure("Field F1, all fields pooled", "percent", 1),
    "word_f1": Figure("Word F1", "percent", 1),
    "number_match": Figure("Number match", "percent", 1),
    "regex_match": Figure("Pattern matches the same text", "percent", 1),
    "regex_found": Figure("Pattern matches", "percent", 1),
    "rouge1": Figure("ROUGE-1", "percent", 1),
    "rouge2": Figure("ROUGE-2", "percent", 1),
    "rougeL": Figure("ROUGE-L", "percent", 1),
    "bleu": Figure("BLEU, 0 to 100", "number", 1),
    "chrf": Figure("chrF, 0 to 100", "number", 1),
    "stop_rate": Figure("Answers that end before the limit", "percent", 1),
    "equal_answers": Figure("Answers equal to the evaluated ones", "percent", 1),
    "same_prompts": Figure("Prompts read as the same tokens", "percent", 1),
    "loss": Figure("Loss (nats per token)", "number", -1),
    "perplexity": Figure("Perplexity", "number", -1),
    "kl": Figure("KL from the tuned model (nats per token)", "number", -1),
    "token_accuracy": Figure("Token accuracy", "percent", 1),
    "size_mb": Figure("Size on disk", "megabytes", -1),
}
"""In the order of the report's table."""

RANGES = {
    "loss": (0.0, math.inf),
    "perplexity": (1.0, math.inf),
    "kl": (0.0, math.inf),
    "size_mb": (0.0, math.inf),
    "bleu": (0.0, 100.0),
    "chrf": (0.0, 100.0),
}
"""Smallest and largest value of figures that are not fractions."""

LM_EVAL_FIGURES = {
    "acc_norm": Figure("accuracy by length", "percent", 1),
    "acc": Figure("accuracy", "percent", 1),
    "exact_match": Figure("exact match", "percent", 1),
    "f1": Figure("F1", "percent", 1),
    "word_perplexity": Figure("perplexity per word", "number", -1),
    "byte_perplexity": Figure("perplexity per byte", "number", -1),
    "bits_per_byte": Figure("bits per byte", "number", -1),
    "perplexity": Figure("perplexity", "number", -1),
}
"""Figures of lm-eval's tasks, by the start of their name; the name of a filter may follow."""

LOWER_ELSEWHERE = (
    "stderr",
    "bits_per_byte",
    "relative_error",
    "dropped",
    "lost",
    "logit_diff",
    "deviation",
    "bad_updates",
    "untrained_modules",
)
"""Figures of other stages of which less is better."""

LOWER = (*(name for name, figure in FIGURES.items() if figure.direction < 0), *LOWER_ELSEWHERE)


def figure_of(name: str) -> Figure:
    """Return how a figure is shown and compared. A figure of an unknown name is labelled with that name."""
    for prefix, rows in ((REGRESSION, "General prompts"), (TEST, "Test rows")):
        if name.startswith(prefix):
            label, kind, direction = figure_of(name.removeprefix(prefix))
            return Figure(
                f"{rows}: {label[0].lower() if label[1:2].islower() else label[0]}{label[1:]}", kind, direction
            )
    task, dot, metric = name.partition(".")
    if dot:
        return _lm_eval_figure(task, metric)
    return FIGURES.get(name, Figure(name))


def _lm_eval_figure(task: str, metric: str) -> Figure:
    for known, (label, kind, direction) in LM_EVAL_FIGURES.items():
        if metric == known or metric.startswith(f"{known}_"):
            chosen = metric.removeprefix(known).strip("_").replace("_", " ")
            return Figure(f"{task}: {label}{f' ({chosen})' if chosen else ''}", kind, direction)
    return Figure(f"{task}: {metric}")


def range_of(name: str) -> tuple[float, float]:
    """Return the smallest and the largest value that a figure can have, by the last part of its name."""
    figure = name.rpartition(".")[2].removeprefix(REGRESSION).removeprefix(TEST)
    if figure.startswith("acc"):
        return 0.0, 1.0
    if figure in FIGURES and FIGURES[figure].kind == "percent":
        return 0.0, 1.0
    return RANGES.get(figure, (-math.inf, math.inf))


def in_order(names: set[str]) -> list[str]:
    """Sort names of figures as in the report's table: known figures, those of test rows and general prompts, others."""
    known = [*FIGURES, *(f"{prefix}{name}" for prefix in (TEST, REGRESSION) for name in FIGURES)]
    return [name for name in known if name in names] + sorted(names.difference(known))


def lower_is_better(name: str) -> bool:
    """Return whether less of a figure is better, by the last part of its name, as for losses and sizes."""
    last = name.rpartition(".")[2]
    return last in LOWER or last.endswith(tuple(f"_{figure}" for figure in LOWER))


def metric_names(section: EvaluateSection, *, with_quantized: bool) -> set[str]:
    """Return the names `model.metric` of all figures that `evaluate` will measure, except those of lm-eval.

    Figures of engines are called `engine.NAME.metric`.

    Args:
        section: The section `evaluate` of params.yaml.
        with_quantized: Whether there is a quantized model.

    Raises:
        ValueError: A task is unknown.
    """
    models = [model for model in MODELS if with_quantized or model != "quantized"]
    asked = [engine_name(text) for text in section.engines]
    of_engine = (EQUAL_ANSWERS, SAME_PROMPTS, *figure_names(section.task), STOP_RATE)
    return {f"{model}.{name}" for model in models for name in _names_of_model(section, model)} | {
        f"{prefix}.{name}" for prefix in asked for name in of_engine
    }


def engine_name(entry: str) -> str:
    """Return what is before the figures of an entry of `evaluate.engines`: `engine.vllm`, `engine.llama_cpp.q8_0`."""
    return f"{ENGINE}.{entry}"


def split_figure(name: str) -> tuple[str, str]:
    """Split `model.metric`, such as `tuned.loss`, `tuned.arc_easy.acc` and `engine.llama_cpp.q8_0.equal_answers`.

    Returns:
        The model and the metric; the metric is empty if there is none.
    """
    model, _, metric = name.rpartition(".") if name.startswith(f"{ENGINE}.") else name.partition(".")
    return model, metric


def all_figures(results: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the figures in results.json by model; engines are called `engine.NAME`."""
    engines = results.get("engines", {})  # older results lack it
    return {**results["models"], **{name: engine["figures"] for name, engine in engines.items()}}


def open_ended_names(section: EvaluateSection, *, with_quantized: bool) -> list[str]:
    """Return the prefixes `model.task.` of lm-eval's figures; which metrics follow is known to lm-eval only."""
    models = [model for model in ANSWERING if with_quantized or model != "quantized"]
    return [f"{model}.{figure_part(task)}." for model in models for task in section.lm_eval.tasks]


def _names_of_model(section: EvaluateSection, model: str) -> list[str]:
    kl = [] if model == REFERENCE else ["kl"]
    names = [*LIKELIHOOD, *kl, "size_mb"]
    if model in ANSWERING:
        names += [*figure_names(section.task), STOP_RATE]
    if section.test is not None:
        names += [f"{TEST}{name}" for name in ("loss", *kl)]
        names += [f"{TEST}{name}" for name in (*figure_names(section.task), STOP_RATE) if model in ANSWERING]
    general = section.regression
    if general.path is not None:
        names += [f"{REGRESSION}{name}" for name in ("loss", *kl)]
        if general.task is not None and model in ANSWERING:
            names += [f"{REGRESSION}{name}" for name in (*figure_names(general.task), STOP_RATE)]
    return names
