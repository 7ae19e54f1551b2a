"""Whether a result may become the champion: the conditions of `publish.gate`, against what the store holds now.

They are checked in `publish` and not in `evaluate`, whose results must not depend on what was recorded before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from sft.gate import Condition, GateRow, check_gate, parse_gate
from stages.artifacts import read_jsonl
from stages.mlflow_run import Tracking
from stages.params import Params
from stages.paths import Paths

CHAMPION = "champion"
HELD_OUT_TAG = "sft.held_out"
FIGURES = "evaluate."


def held_out_digest(paths: Paths) -> str:
    """SHA-256 of the prompts and references that the models were measured on."""
    rows = read_jsonl(paths.out("evaluate", "generations.jsonl"))
    return hashlib.sha256(repr([(row["prompt"], row["reference"]) for row in rows]).encode()).hexdigest()


def check_promotion(
    tracking: Tracking, params: Params, paths: Paths, run_id: str, models: Mapping[str, Any]
) -> list[GateRow]:
    """Check `publish.gate`; conditions on the champion hold while there is none, or while it is this very result.

    Args:
        tracking: Where the champion is recorded.
        params: With the conditions.
        paths: Of the checkout.
        run_id: The run of this result.
        models: The figures of this result's models.
    """
    conditions = parse_gate(params.publish.gate)  # the names in it were checked with params.yaml
    champion = find_champion(tracking, params.publish.registered_model) if conditions else None
    results = {**models, **(champion_figures(champion) if champion else {})}
    rows = []
    for condition, row in zip(conditions, check_gate(conditions, results), strict=True):
        rows.append(judge(condition, row, champion, run_id, held_out_digest(paths)))
    return rows


def judge(condition: Condition, row: GateRow, champion: Run | None, run_id: str, held_out: str) -> GateRow:
    """The verdict on one condition, which on a champion is only worth something for the same held-out rows."""
    if not any(name.startswith(f"{CHAMPION}.") for name in condition.names):
        return row
    if champion is None:
        return GateRow(condition.text, None, None, True, "there is no champion yet")
    if champion.info.run_id == run_id:
        return GateRow(condition.text, None, None, True, "this result is the champion")
    if champion.data.tags.get(HELD_OUT_TAG) != held_out:
        reason = (
            "the champion was measured on other held-out rows; move the alias by hand once, or take this condition out"
        )
        return GateRow(condition.text, None, None, False, reason)
    return row


def find_champion(tracking: Tracking, name: str) -> Run | None:
    """The run of the version that the alias points at."""
    try:
        version = tracking.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return tracking.client.get_run(version.run_id)


def champion_figures(champion: Run) -> dict[str, dict[str, float]]:
    """`champion.MODEL` -> metric -> value, as the champion's run has recorded them."""
    found: dict[str, dict[str, float]] = {}
    for name, value in champion.data.metrics.items():
        model, _, metric = name.removeprefix(FIGURES).partition(".")
        if name.startswith(FIGURES) and metric:
            found.setdefault(f"{CHAMPION}.{model}", {})[metric] = value
    return found
