"""The champion in the model registry, and the conditions (`publish.gate`) on which a result replaces it.

They are checked in `publish` rather than in `evaluate`, whose results must not depend on earlier records.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from sft.evaluate.evidence import Evidence
from sft.evaluate.gate import Condition, GateRow, check_gate, parse_gate, passes_with
from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.params.figures import split_figure
from stages.params.schema import Params
from stages.tracking.store import Tracking

CANDIDATE = "candidate"

CHAMPION = "champion"

HELD_OUT_TAG = "sft.held_out"

METRIC_PREFIX = "evaluate."

BASE = "base"

BASE_CONDITION = "the gate asks for more than the base model has"

NOT_OF_QUALITY = ("size_mb", "kl", "regression_kl")
"""Figures that tell nothing about how well a model does."""

RESULTS_FOLDER = "outs/evaluate"

PUBLICATION_TAG = "sft.publication"
"""Tag of a version while `publish` moves aliases to it: what they were before, and the conditions of `publish.gate`."""


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
    params: Params,
    paths: Paths,
    run_id: str,
    models: Mapping[str, Any],
    champion: Champion | None,
    evidence: Evidence | None = None,
) -> list[GateRow]:
    """Check the conditions of `publish.gate`, and that both gates ask for more than the base model's figures.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
        run_id: Id of the run of this result.
        models: Model -> metric -> value of this result.
        champion: The champion before this result, if there is one.
        evidence: How certain the figures of this result and of the champion are; None = they are exact.

    Returns:
        One row per condition, and one for the base model. A condition on the champion is met if there is no champion,
        or if it is this result.
    """
    conditions = parse_gate(params.publish.gate)  # the names in it were checked with params.yaml
    results = {**models, **(champion.figures if champion else {})}
    rows = []
    checked = check_gate(conditions, results, evidence, params.evaluate.gate_needs)
    for condition, row in zip(conditions, checked, strict=True):
        rows.append(_check_condition(condition, row, champion, run_id, held_out_digest(paths)))
    return [*rows, check_base(params, results)]


def check_base(params: Params, results: Mapping[str, Mapping[str, float]]) -> GateRow:
    """Check that the base model, in the place of the trained ones, would not pass both gates.

    Otherwise the gates ask for nothing that training has to achieve.

    Args:
        params: Values of params.yaml.
        results: Model -> metric -> value, of this result and of the champion if there is one.
    """
    asked = parse_gate([*params.evaluate.gate, *params.publish.gate])
    if not any(name.startswith(f"{CHAMPION}.") for name in results):  # these conditions have nothing to compare with
        asked = [condition for condition in asked if not any(n.startswith(f"{CHAMPION}.") for n in condition.names)]
    if not passes_with(asked, results, BASE, NOT_OF_QUALITY):
        return GateRow(BASE_CONDITION, None, None, True, "a condition fails with the figures of the base model")
    what = "there is no condition" if not asked else "the base model would pass too"
    reason = f"{what}; add one that training must achieve, such as tuned.loss < 0.9 * base.loss"
    return GateRow(BASE_CONDITION, None, None, False, reason)


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


@dataclass(frozen=True)
class Publication:
    """The publication of a version, from the look at the aliases to the page that tells how they moved.

    It is written down as a tag of the version before an alias moves. If `publish` is killed after that, the next
    attempt finds the tag, and its page tells what the aliases were before the first attempt.

    Args:
        tracking: The store.
        name: Name of the registered model.
        version: Number of the version.
        before: Alias -> the version that it pointed at; None if it did not exist.
    """

    tracking: Tracking
    name: str
    version: str
    before: Mapping[str, str | None]

    def finish(self) -> None:
        """Delete the tag, after the page has been written."""
        self.tracking.client.delete_model_version_tag(self.name, self.version, PUBLICATION_TAG)


def begin_publication(tracking: Tracking, name: str, version: str, gate: Sequence[str]) -> Publication:
    """Begin the publication of a version, or continue one that was interrupted.

    Args:
        tracking: The store.
        name: Name of the registered model.
        version: Number of the version.
        gate: Conditions of `publish.gate`.
    """
    now = {
        alias: None if found is None else str(found.version)
        for alias in (CANDIDATE, CHAMPION)
        for found in [alias_version(tracking, name, alias)]
    }
    tags = tracking.client.get_model_version(name, version).tags
    noted = json.loads(tags[PUBLICATION_TAG]) if PUBLICATION_TAG in tags else None
    if noted is not None and noted["gate"] == list(gate) and _is_interrupted(noted["before"], now, version):
        return Publication(tracking, name, version, noted["before"])
    note = json.dumps({"gate": list(gate), "before": now})
    tracking.client.set_model_version_tag(name, version, PUBLICATION_TAG, note)
    return Publication(tracking, name, version, now)


def _is_interrupted(before: Mapping[str, str | None], now: Mapping[str, str | None], version: str) -> bool:
    """Return whether the aliases are where the publication found them or where it moves them, and nowhere else."""
    return all(now[alias] in (before[alias], version) for alias in now)


def find_champion(tracking: Tracking, name: str, version: str | None) -> Champion | None:
    """Return a version of a registered model as the champion, with the figures of its run.

    Args:
        tracking: The store.
        name: Name of the registered model.
        version: Number of the version; None if there is no champion.
    """
    if version is None:
        return None
    run = tracking.client.get_run(tracking.client.get_model_version(name, version).run_id)
    held_out = run.data.tags.get(HELD_OUT_TAG)
    return Champion(version, run.info.run_id, run.info.run_name, champion_figures(run), held_out)


def alias_version(tracking: Tracking, name: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that an alias points at, None if it points at none."""
    try:
        return tracking.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def fetch_results(tracking: Tracking, run_id: str, folder: Path) -> Path:
    """Download what a run has of outs/evaluate; older runs have fewer files.

    Args:
        tracking: The store.
        run_id: Id of the run.
        folder: Where to write the files.

    Returns:
        The folder with the files, which may be empty.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    place = folder / RESULTS_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    for item in tracking.client.list_artifacts(run_id, RESULTS_FOLDER):
        tracking.client.download_artifacts(run_id, item.path, str(place))
    return place


def champion_figures(champion: Run) -> dict[str, dict[str, float]]:
    """Return `champion.MODEL` -> metric -> value from the metrics of the champion's run."""
    found: dict[str, dict[str, float]] = {}
    for name, value in champion.data.metrics.items():
        model, metric = split_figure(name.removeprefix(METRIC_PREFIX))
        if name.startswith(METRIC_PREFIX) and metric:
            found.setdefault(f"{CHAMPION}.{model}", {})[metric] = value
    return found
