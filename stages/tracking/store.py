"""The little of MLflow that `publish` needs: find or write a run, register a version, move an alias."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from stages.params.schema import PublishSection

SQLITE = "sqlite:///"
BATCH = 100
CURVE = "curve."
TRAINING_TAG = "sft.training_digest"
"""Of a run whose training has ended: what `publish` finds it by."""

PROGRESS_TAG, PUBLISHED = "sft.progress", "published"
KIND_TAG, SWEEP = "sft.kind", "sweep"
"""Of a run that is no result but the parent of several."""

# Makes the page show the runs as trainings rather than as evaluations of a prompt.
KIND = {"mlflow.experimentKind": "custom_model_development"}


def open_tracking(section: PublishSection, home: Path) -> Tracking:
    """Open the tracking store and its experiment, which is made when it does not exist.

    Args:
        section: Where to record.
        home: The main checkout: a relative SQLite path and the artifacts lie in it, whatever worktree a run works in.

    Raises:
        ValueError: The store can't be reached or used.
    """
    uri = absolute_uri(section.tracking_uri, home)
    # A store that a server keeps decides itself where artifacts go.
    local = uri.startswith(SQLITE)
    location = (home / "mlartifacts" / section.experiment).as_uri() if local else None
    # Resolving a logged model's URI goes by the process's store, not by the client's.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = client.get_experiment_by_name(section.experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            client.restore_experiment(experiment.experiment_id)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(section.experiment, artifact_location=location, tags=KIND)
        )
    except MlflowException as error:
        raise ValueError(f"publish.tracking_uri {section.tracking_uri!r} ({uri}) can't be used: {error}") from error
    return Tracking(client, uri, experiment_id)


def absolute_uri(uri: str, home: Path) -> str:
    """A relative SQLite path as one below `home`; everything else as it is."""
    if not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_absolute():
        return uri
    return f"{SQLITE}{home / uri.removeprefix(SQLITE)}"


@dataclass(frozen=True)
class Tracking:
    """An open store and experiment."""

    client: MlflowClient
    uri: str
    experiment_id: str

    def find_run(self, tag: str, value: str) -> str | None:
        """The finished run that carries a tag, the oldest when there are several."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC"],
        )
        return runs[0].info.run_id if runs else None

    def find_unfinished(self, tag: str, value: str) -> list[str]:
        """The runs that carry a tag and have not been completed, whatever became of them; the newest first."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` = '{value}' and attributes.status != 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time DESC"],
        )
        return [run.info.run_id for run in runs]

    @contextmanager
    def whole_run(self, name: str, tags: Mapping[str, str], begun: str | None = None) -> Iterator[RunWriter]:
        """A run that is finished when the block ends, and failed when it raises.

        Args:
            name: What it is called.
            tags: Set before the block begins.
            begun: A run that a training has begun, to be completed; None = a new one.
        """
        if begun is None:
            begun = self.client.create_run(self.experiment_id, run_name=name).info.run_id
        else:
            self.client.update_run(begun, status="RUNNING", name=name)
        writer = RunWriter(self.client, begun)
        try:
            writer.set_tags(tags)
            yield writer
        except BaseException:
            self.client.set_terminated(writer.run_id, "FAILED")
            raise
        self.client.set_terminated(writer.run_id, "FINISHED")

    def register(self, name: str, run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float], key: str) -> str:
        """The version of a registered model that carries tag `key` of this result, made when there is none.

        The version points at a logged model without files: DVC keeps the weights.
        """
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(key) == tags[key] and version.run_id == run_id:
                return str(version.version)
        model = self.client.create_logged_model(self.experiment_id, name=name, source_run_id=run_id, tags=dict(tags))
        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(metric, value, now, 0, model_id=model.model_id) for metric, value in metrics.items()],
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        version = self.client.create_model_version(
            name, source=f"models:/{model.model_id}", run_id=run_id, tags=dict(tags), model_id=model.model_id
        )
        return str(version.version)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias of a registered model at a version."""
        self.client.set_registered_model_alias(name, alias, version)


@dataclass(frozen=True)
class RunWriter:
    """Writes into one run."""

    client: MlflowClient
    run_id: str

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params; what is no plain value is logged as JSON."""
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
        for start in range(0, len(texts), BATCH):
            chunk = list(texts.items())[start : start + BATCH]
            self.client.log_batch(self.run_id, params=[Param(name, text) for name, text in chunk])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log figures that have one value."""
        now = int(time.time() * 1000)
        values = [Metric(name, value, now, 0) for name, value in metrics.items()]
        for start in range(0, len(values), BATCH):
            self.client.log_batch(self.run_id, metrics=values[start : start + BATCH])

    def log_curve(self, path: Path) -> None:
        """Log the columns of a CSV beside `step` as metrics `curve.<column>`: those points that the run lacks."""
        now = int(time.time() * 1000)
        with path.open(encoding="utf-8", newline="") as file:
            values = [
                Metric(f"{CURVE}{name}", float(value), now, int(row["step"]))
                for row in csv.DictReader(file)
                for name, value in row.items()
                if name != "step" and value
            ]
        known = {(point.key, point.step, point.value) for point in self.points(CURVE)}
        self.log_points([point for point in values if (point.key, point.step, point.value) not in known])

    def log_points(self, points: Sequence[Metric]) -> None:
        """Log points of curves."""
        for start in range(0, len(points), 10 * BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + 10 * BATCH])

    def points(self, prefix: str) -> list[Metric]:
        """All points of the curves whose names begin so."""
        names = [name for name in self.client.get_run(self.run_id).data.metrics if name.startswith(prefix)]
        return [point for name in names for point in self.client.get_metric_history(self.run_id, name)]

    def log_data(self, digests: Mapping[str, str]) -> None:
        """Log data files by name and digest, the way MLflow shows data sets."""
        inputs = [
            DatasetInput(Dataset(name, digest[:36], "local", json.dumps({"path": name, "sha256": digest})))
            for name, digest in digests.items()
        ]
        if inputs:
            self.client.log_inputs(self.run_id, datasets=inputs)

    def log_file(self, path: Path, folder: str) -> None:
        """Keep a copy of a file with the run."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def set_tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self.client.set_tag(self.run_id, key, value)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        for start in range(0, len(tags), BATCH):
            chunk = list(tags.items())[start : start + BATCH]
            self.client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in chunk])
