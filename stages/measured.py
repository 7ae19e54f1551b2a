"""Which `model.metric` figures an evaluation has: known beforehand, so that a wrong gate is refused at once."""

from __future__ import annotations

from stages.scoring import figure_names

# KL is measured of all others against the tuned model
REFERENCE = "tuned"
LIKELIHOOD = ("loss", "perplexity", "token_accuracy")
MODELS = ("base", "tuned", "merged", "quantized")
# `merge` has proved that the merged model's logits are those of the tuned one, so it need not answer again
ANSWERING = ("base", "tuned", "quantized")


def metric_names(task: str | list[str], *, with_quantized: bool) -> set[str]:
    """Every `model.metric` that `evaluate` will measure.

    Args:
        task: `evaluate.task`.
        with_quantized: Whether `quantize` makes a model.

    Raises:
        ValueError: A task is unknown.
    """
    answers = [*figure_names(task), "stop_rate"]
    return {
        f"{model}.{metric}"
        for model in MODELS
        if with_quantized or model != "quantized"
        for metric in [
            *LIKELIHOOD,
            *([] if model == REFERENCE else ["kl"]),
            "size_mb",
            *(answers if model in ANSWERING else []),
        ]
    }
