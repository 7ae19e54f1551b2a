"""Which `model.metric` figures an evaluation has: known beforehand, so that a wrong gate is refused at once."""

from __future__ import annotations

from sft.metrics import TASKS

LIKELIHOOD = ("loss", "perplexity", "token_accuracy")
MODELS = ("base", "tuned", "merged", "quantized")
# `merge` has proved that the merged model's logits are those of the tuned one, so it need not answer again
ANSWERING = ("base", "tuned", "quantized")


def metric_names(task: str, *, with_quantized: bool) -> set[str]:
    """Every `model.metric` that `evaluate` will measure.

    Args:
        task: A name of `sft.metrics.TASKS`.
        with_quantized: Whether `quantize` makes a model.
    """
    scores = TASKS[task].score("{}", "{}")
    summary = TASKS[task].summarize(["{}"], ["{}"])
    answers = [*scores, *summary, "stop_rate"]
    return {
        f"{model}.{metric}"
        for model in MODELS
        if with_quantized or model != "quantized"
        for metric in [*LIKELIHOOD, "size_mb", *(answers if model in ANSWERING else [])]
    }
