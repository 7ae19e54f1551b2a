"""Whether a result may become the champion: the conditions of `publish.gate`, against what the store holds now.

They are checked in `publish` and not in `evaluate`, whose results must not depend on what was recorded before.
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

FIGURES = "evaluate."


def held_out_digest(paths: Paths) -> str:
    """SHA-256 of the prompts and references that the models were measured on."""
    rows = read_jsonl(paths.out("evaluate", "generations.jsonl"))
    return hashlib.sha256(repr([(row["prompt"], row["reference"]) for row in rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Champion:
    """What the alias points at.

    Args:
        version: Of the registered model.
        run_id: Its run's.
        name: Its run's.
        figures: `champion.MODEL` -> metric -> value.
        held_out: Digest of the rows that it was measured on.
    """

    version: str
    run_id: str
    name: str
    figures: Mapping[str, Mapping[str, float]]
    held_out: str | None


def check_promotion(
    params: Params, paths: Paths, run_id: str, models: Mapping[str, Any], champion: Champion | None
) -> list[GateRow]:
    """Check `publish.gate`; conditions on the champion hold while there is none, or while it is this very result.

    Args:
        params: With the conditions.
        paths: Of the checkout.
        run_id: The run of this result.
        models: The figures of this result's models.
        champion: Before this result.
    """
    conditions = parse_gate(params.publish.gate)  # the names in it were checked with params.yaml
    results = {**models, **(champion.figures if champion else {})}
    rows = []
    for condition, row in zip(conditions, check_gate(conditions, results), strict=True):
        rows.append(judge(condition, row, champion, run_id, held_out_digest(paths)))
    return rows


def judge(condition: Condition, row: GateRow, champion: Champion | None, run_id: str, held_out: str) -> GateRow:
    """The verdict on one condition, which on a champion is only worth something for the same held-out rows."""
    if not any(name.startswith(f"{CHAMPION}.") for name in condition.names):
        return row
    if champion is None:
        return GateRow(condition.text, None, None, True, "there is no champion yet")
    if champion.run_id == run_id:
        return GateRow(condition.text, None, None, True, "this result is the champion")
    if champion.held_out != held_out:
        reason = (
            "the champion was measured on other held-out rows; move the alias by hand once, or take this condition out"
        )
        return GateRow(condition.text, None, None, False, reason)
    return row


def find_champion(tracking: Tracking, name: str) -> Champion | None:
    """The version that the alias points at, and what its run has recorded."""
    version = alias_version(tracking, name, CHAMPION)
    if version is None:
        return None
    run = tracking.client.get_run(version.run_id)
    held_out = run.data.tags.get(HELD_OUT_TAG)
    return Champion(str(version.version), run.info.run_id, run.info.run_name, champion_figures(run), held_out)


def alias_version(tracking: Tracking, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points at, None where it points at none."""
    try:
        return tracking.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def champion_figures(champion: Run) -> dict[str, dict[str, float]]:
    """`champion.MODEL` -> metric -> value, as the champion's run has recorded them."""
    found: dict[str, dict[str, float]] = {}
    for name, value in champion.data.metrics.items():
        model, _, metric = name.removeprefix(FIGURES).partition(".")
        if name.startswith(FIGURES) and metric:
            found.setdefault(f"{CHAMPION}.{model}", {})[metric] = value
    return found
