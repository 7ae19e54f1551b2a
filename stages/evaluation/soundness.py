"""Checks that the merged model equals the tuned one, and that the tuned one has the loss that training measured.

`merge` compares logits on sample rows only. These checks use all held-out rows, so that a checkpoint that was changed,
confused with another or loaded incorrectly closes the gate, whatever its conditions are.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping

from sft.evaluate.gate import GateRow
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.evaluation.results import ModelResult
from stages.models.variants import MADE_BY, Variant
from stages.params.schema import Params

MAX_KL = 1e-6
"""Largest KL divergence in float32 (nats per token); rounding gives 3e-13 on the default model."""

MAX_KL_HALF = 0.05
"""The same in half precision, where merged weights are rounded once, but base and adapter separately."""

MARGIN, MARGIN_HALF = (0.002, 1e-4), (0.05, 2e-3)
"""Largest difference of two evaluations of a loss, in float32 and half precision: relative, and in nats per token.

Rounding gives 1e-7 on the default model.
"""


def check_finite(variant: Variant, measured: ModelResult) -> None:
    """Check that the loss of a model is finite, as its other figures are meaningless otherwise.

    Raises:
        ValueError: It is not; names the model, its folder and the stage that writes it.
    """
    loss = measured.figures["loss"]
    if math.isfinite(loss):
        return
    stage = MADE_BY[variant.name][0]
    raise ValueError(
        f"the {variant.name} model has a loss of {loss} on the held-out rows: its weights in "
        f"{variant.adapter or variant.checkpoint} are broken, or overflow in the dtype that they are loaded in; the "
        f"stage `{stage}` writes them"
    )


def failed_checks(figures: Mapping[str, Mapping[str, float]], params: Params, paths: Paths) -> list[GateRow]:
    """Return a failed row of the gate for each of the two checks that fails.

    Args:
        figures: Model -> metric -> value.
        params: Values of params.yaml: dtype of the model, method and loss of the training.
        paths: The checkout, with the metrics of `merge` and the curve of `train`.
    """
    rows = [*_check_merged(figures, params, paths), *_check_tuned(figures, params, paths)]
    return [row for row in rows if not row.passed]


def _row(condition: str, found: float, limit: float, passed: bool, reason: str) -> GateRow:
    """Create a row of the gate; a value that is not finite is None, as JSON has no NaN, and only in the reason."""
    return GateRow(condition, found if math.isfinite(found) else None, limit, passed, reason)


def _check_merged(figures: Mapping[str, Mapping[str, float]], params: Params, paths: Paths) -> Iterator[GateRow]:
    file = paths.metrics("merge")
    proven = read_json(file).get("max_logit_diff", 0.0) if file.exists() else 0.0
    # the divergence is at most about the square of the largest difference of logits
    limit = max(MAX_KL if params.model.dtype == "float32" else MAX_KL_HALF, proven**2)
    found = figures["merged"]["kl"]
    reason = (
        f"the merged model is not the tuned one, its answers diverge by {found:.3g} nats per token: its folder was "
        "changed after the stage `merge`; `dvc repro merge` writes it again"
    )
    yield _row(f"merged.kl <= {limit:.2g}", found, limit, found <= limit, reason)


def _check_tuned(figures: Mapping[str, Mapping[str, float]], params: Params, paths: Paths) -> Iterator[GateRow]:
    """Skip trainings whose held-out loss is another figure: those on a 4-bit base or with another loss."""
    trained = _shipped_eval_loss(paths)
    if params.train.method == "qlora" or params.train.loss_type != "nll" or trained is None:
        return
    found = figures["tuned"]["loss"]
    relative, absolute = MARGIN if params.model.dtype == "float32" else MARGIN_HALF
    margin = relative * trained + absolute
    reason = (
        f"the tuned model has a loss of {found:.4g} on the rows on which training measured {trained:.4g} for them: "
        "its folder or its base was changed after the stage `train`; `dvc repro train` writes it again"
    )
    is_close = abs(found - trained) <= margin
    yield _row(f"tuned.loss within {margin:.2g} of {trained:.4g}", found, trained, is_close, reason)


def _shipped_eval_loss(paths: Paths) -> float | None:
    """Return the held-out loss of the step that was shipped, None if the training's curve has none."""
    with paths.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        losses = {int(row["step"]): float(row["eval_loss"]) for row in csv.DictReader(file) if row.get("eval_loss")}
    selection = paths.out("train", "selection.json")
    step = read_json(selection)["step"] if selection.exists() else max(losses, default=None)
    return None if step is None else losses.get(int(step))
