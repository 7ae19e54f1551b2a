"""Which `model.metric` figures an evaluation has: known beforehand, so that a wrong gate is refused at once."""

from __future__ import annotations

from sft.evaluate.lm_eval import figure_part
from stages.params.evaluate_params import EvaluateSection
from stages.params.figures import REGRESSION
from stages.params.tasks import figure_names

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
