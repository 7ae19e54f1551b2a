"""The champion in the model registry, and the conditions (`publish.gate`) on which a result replaces it.

They are checked in `publish` rather than in `evaluate`, whose results must not depend on earlier records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from sft.evaluate.gate import Condition, GateRow, check_gate, parse_gate
from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import Params
from stages.tracking.store import Tracking

CANDIDATE = "candidate"

CHAMPION = "champion"

HELD_OUT_TAG = "sft.held_out"

METRIC_PREFIX = "evaluate."


def held_out_digest(paths: Paths) -> str:
    """Return the SHA-256 of the prompts and references that the models were measured on."""
    rows = read_jsonl(paths.out("evaluate", "generations.jsonl"))
    return hashlib.sha256(repr([(row["prompt"], row["reference"]) for row in rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Champion:
    """The version of the registered model that the alias `champion` points at.

    Args:
        version: Number of the version.
        run_id: Id of its run.
        name: Name of its run.
        figures: `champion.MODEL` -> metric -> value.
        held_out: Digest of the held-out rows that it was measured on; None if its run has no such tag.
    """

    version: str
    run_id: str
    name: str
    figures: Mapping[str, Mapping[str, float]]
    held_out: str | None


def check_promotion(
    params: Params, paths: Paths, run_id: str, models: Mapping[str, Any], champion: Champion | None
) -> list[GateRow]:
    """Check the conditions of `publish.gate`.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
        run_id: Id of the run of this result.
        models: Model -> metric -> value of this result.
        champion: The champion before this result, if there is one.

    Returns:
        One row per condition. A condition on the champion is met if there is no champion, or if it is this result.
    """
    conditions = parse_gate(params.publish.gate)  # the names in it were checked with params.yaml
    results = {**models, **(champion.figures if champion else {})}
    rows = []
    for condition, row in zip(conditions, check_gate(conditions, results), strict=True):
        rows.append(_check_condition(condition, row, champion, run_id, held_out_digest(paths)))
    return rows


def _check_condition(
    condition: Condition, row: GateRow, champion: Champion | None, run_id: str, held_out: str
) -> GateRow:
    """Return the row of a condition; one on the champion also fails if it was measured on other held-out rows."""
    if not any(name.startswith(f"{CHAMPION}.") for name in condition.names):
        return row
    if champion is None:
        return GateRow(condition.text, None, None, True, "there is no champion yet")
    if champion.run_id == run_id:
        return GateRow(condition.text, None, None, True, "this result is the champion")
    if champion.held_out != held_out:
        reason = (
            "the champion was measured on other held-out rows; move the alias by hand once, or remove this condition"
        )
        return GateRow(condition.text, None, None, False, reason)
    return row


def find_champion(tracking: Tracking, name: str) -> Champion | None:
    """Return the champion of a registered model with the figures of its run; None if it has no champion."""
    version = alias_version(tracking, name, CHAMPION)
    if version is None:
        return None
    run = tracking.client.get_run(version.run_id)
    held_out = run.data.tags.get(HELD_OUT_TAG)
    return Champion(str(version.version), run.info.run_id, run.info.run_name, champion_figures(run), held_out)


def alias_version(tracking: Tracking, name: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that an alias points at, None if it points at none."""
    try:
        return tracking.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def champion_figures(champion: Run) -> dict[str, dict[str, float]]:
    """Return `champion.MODEL` -> metric -> value from the metrics of the champion's run."""
    found: dict[str, dict[str, float]] = {}
    for name, value in champion.data.metrics.items():
        model, _, metric = name.removeprefix(METRIC_PREFIX).partition(".")
        if name.startswith(METRIC_PREFIX) and metric:
            found.setdefault(f"{CHAMPION}.{model}", {})[metric] = value
    return found
