"""Whether the models are what they are said to be: the merged one the tuned one, the tuned one what training measured.

`merge` has proved the first on sample rows and DVC guards the folders; here both are measured on all held-out rows, so
that a checkpoint that was changed, mixed up or read wrongly closes the gate whatever its conditions say.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping

from sft.evaluate.gate import GateRow
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.evaluation.results import Measured
from stages.models.variants import MADE_BY, Variant
from stages.params.schema import Params

MAX_KL = 1e-6
"""Nats a token that rounding in float32 stays far below: 3e-13 on the default model."""
MAX_KL_HALF = 0.05
"""In half precision the merged weights are rounded, base and adapter were rounded apart."""
MARGIN, MARGIN_HALF = (0.002, 1e-4), (0.05, 2e-3)
"""Part of the loss, and nats a token, by which two evaluations may differ: on the default model they do by 1e-7."""


def check_finite(variant: Variant, measured: Measured) -> None:
    """Refuse a model whose loss is no number: nothing else that it does would mean anything.

    Raises:
        ValueError: Names the model, its folder and the stage that makes it.
    """
    loss = measured.figures["loss"]
    if math.isfinite(loss):
        return
    stage = MADE_BY[variant.name][0]
    raise ValueError(
        f"the {variant.name} model has a loss of {loss} on the held-out rows: its weights in "
        f"{variant.adapter or variant.checkpoint} are broken, or overflow in the dtype that they are loaded in; the "
        f"stage `{stage}` makes them"
    )


def broken_promises(figures: Mapping[str, Mapping[str, float]], params: Params, paths: Paths) -> list[GateRow]:
    """One failed row of the gate for everything that is not what it is said to be.

    Args:
        figures: model -> metric -> value.
        params: dtype of the model, and how it was trained.
        paths: Of the checkout; reads the figures of `merge` and the curve of `train`.
    """
    rows = [*_merged_is_tuned(figures, params, paths), *_tuned_was_trained(figures, params, paths)]
    return [row for row in rows if not row.passed]


def _row(condition: str, found: float, limit: float, passed: bool, reason: str) -> GateRow:
    """A row of the gate; JSON has no NaN, so that such a figure stands in the reason alone."""
    return GateRow(condition, found if math.isfinite(found) else None, limit, passed, reason)


def _merged_is_tuned(figures: Mapping[str, Mapping[str, float]], params: Params, paths: Paths) -> Iterator[GateRow]:
    file = paths.metrics("merge")
    proven = read_json(file).get("max_logit_diff", 0.0) if file.exists() else 0.0
    # a divergence is at most about the square of the largest difference of logits
    limit = max(MAX_KL if params.model.dtype == "float32" else MAX_KL_HALF, proven**2)
    found = figures["merged"]["kl"]
    reason = (
        f"the merged model is not the tuned one, its answers diverge by {found:.3g} nats a token: its folder was "
        "changed behind the stage `merge`; `dvc repro merge` makes it again"
    )
    yield _row(f"merged.kl <= {limit:.2g}", found, limit, found <= limit, reason)


def _tuned_was_trained(figures: Mapping[str, Mapping[str, float]], params: Params, paths: Paths) -> Iterator[GateRow]:
    """Not asked of what training measures otherwise: a 4-bit base, another loss."""
    trained = _last_eval_loss(paths)
    if params.train.method == "qlora" or params.train.loss_type != "nll" or trained is None:
        return
    found = figures["tuned"]["loss"]
    relative, absolute = MARGIN if params.model.dtype == "float32" else MARGIN_HALF
    margin = relative * trained + absolute
    reason = (
        f"the tuned model has a loss of {found:.4g} on the rows on which training measured {trained:.4g} at its end: "
        "its folder or its base was changed behind the stage `train`; `dvc repro train` makes it again"
    )
    is_close = abs(found - trained) <= margin
    yield _row(f"tuned.loss within {margin:.2g} of {trained:.4g}", found, trained, is_close, reason)


def _last_eval_loss(paths: Paths) -> float | None:
    """The last held-out loss of the training, None where its curve has none."""
    with paths.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        losses = [row["eval_loss"] for row in csv.DictReader(file) if row.get("eval_loss")]
    return float(losses[-1]) if losses else None
