"""Results side by side: as MLflow recorded them or as the checkout has them, and what differs between two of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.params.schema import Params
from stages.tracking import lineage
from stages.tracking.champion import HELD_OUT_TAG, RESULTS_FOLDER, fetch_results, held_out_digest
from stages.tracking.lineage import MACHINE
from stages.tracking.result import DIGEST_TAG, figures, result_digest_of
from stages.tracking.store import GATE_TAG, Tracking, whole_value

VERSION, COMMIT, DIRTY, CODE, BASE = "version.", "git.commit", "git.dirty", "git.changed_code", "sft.base_model"
CURVE = "outs/train/curve.csv"
PRESENT = "the result in this checkout"


@dataclass(frozen=True)
class Difference:
    """A value that differs between two results.

    Args:
        name: Its name.
        before: Its value in the first result; None if that one lacks it.
        after: The same for the second result.
    """

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Recorded:
    """What is known of a result besides its files.

    Args:
        name: Name of its run.
        run_id: Id of its run in MLflow; None for the result in the checkout.
        tags: Lineage: commit, versions, machine, gate, digests.
        params: Dotted name -> value as MLflow keeps it.
        data: Name of a data file -> SHA-256.
        metrics: `<stage>.<metric>` -> value.
    """

    name: str
    run_id: str | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    data: Mapping[str, str]
    metrics: Mapping[str, float]


def recorded_run(run: Run) -> Recorded:
    """Return what MLflow has of a run."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    data = {item.dataset.name: json.loads(item.dataset.source)["sha256"] for item in inputs}
    return Recorded(run.info.run_name, run.info.run_id, run.data.tags, run.data.params, data, run.data.metrics)


def present_result(params: Params, paths: Paths) -> Recorded:
    """Return the result in the checkout as a run of it would be recorded.

    Raises:
        ValueError: There is none yet.
    """
    file = paths.out("evaluate", "results.json")
    if not file.exists():
        raise ValueError(f"{file} is missing: this checkout has no result yet; `sft repro` computes one")
    values = lineage.result_params(params)
    texts = {name: redact(v if isinstance(v, str) else json.dumps(v)) for name, v in values.items()}
    tags = {
        GATE_TAG: "passed" if read_json(file)["passed"] else "failed",
        HELD_OUT_TAG: held_out_digest(paths),
        DIGEST_TAG: result_digest_of(params, paths),
        **lineage.circumstances(paths),
        **lineage.machine_tags(),
    }
    return Recorded(PRESENT, None, tags, texts, lineage.data_digests(paths), figures(paths))


def fetch_files(result: Recorded, tracking: Tracking, paths: Paths, folder: Path) -> Path:
    """Copy the curve and the rows of a result into a folder, under the paths that they have in a checkout.

    Args:
        result: A result.
        tracking: The store that its run is in.
        paths: The checkout, for its present result.
        folder: Where to write the files. Files that an older run lacks are missing.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if result.run_id is None:
        shutil.copytree(paths.out("evaluate"), folder / RESULTS_FOLDER, dirs_exist_ok=True)
        (folder / CURVE).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths.root / CURVE, folder / CURVE)
        return folder
    fetch_results(tracking, result.run_id, folder)
    if any(item.path == CURVE for item in tracking.client.list_artifacts(result.run_id, "outs/train")):
        (folder / CURVE).parent.mkdir(parents=True, exist_ok=True)
        tracking.client.download_artifacts(result.run_id, CURVE, str((folder / CURVE).parent))
    return folder


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return the entries that differ between two mappings, including those that only one has."""
    names = [*before, *(name for name in after if name not in before)]
    return [
        Difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    ]


def find_causes(first: Recorded, second: Recorded, client: MlflowClient | None = None) -> dict[str, list[Difference]]:
    """Return kind -> what differs between the inputs of two results: params, data, base model, code and the rest.

    Args:
        first: A result.
        second: Another one.
        client: Client of the store, by which long params are read from the artifacts; None = show their digests.
    """

    def tagged(wanted: Callable[[str], bool]) -> list[Difference]:
        chosen = ({name: tags[name] for name in sorted(tags) if wanted(name)} for tags in (first.tags, second.tags))
        return differences(*chosen)

    params = sorted(differences(first.params, second.params), key=lambda difference: difference.name)
    if client is not None:
        params = [_read_whole(client, first, second, difference) for difference in params]
    # older runs have no digest of the uncommitted changes, only a tag for whether anything was uncommitted
    code = (COMMIT, CODE) if all(CODE in result.tags for result in (first, second)) else (COMMIT, DIRTY)
    return {
        "params": [difference for difference in params if difference.before != difference.after],
        "data": differences(first.data, second.data),
        "base model": tagged(lambda name: name.startswith(BASE)),
        "code": tagged(lambda name: name in code),
        "versions": tagged(lambda name: name.startswith(VERSION)),
        "machine": tagged(lambda name: name.startswith(MACHINE)),
    }


def _read_whole(client: MlflowClient, first: Recorded, second: Recorded, difference: Difference) -> Difference:
    """Return a difference of params with the whole values, if they were too long for MLflow."""
    before, after = (
        value if value is None or result.run_id is None else whole_value(client, result.run_id, value)
        for result, value in ((first, difference.before), (second, difference.after))
    )
    return Difference(difference.name, before, after)


def differing_rows(first: Recorded, second: Recorded) -> bool:
    """Return whether two results are known to be measured on different held-out rows."""
    tags = [result.tags.get(HELD_OUT_TAG) for result in (first, second)]
    return None not in tags and tags[0] != tags[1]
