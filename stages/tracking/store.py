"""Tracking store (MLflow): opening it, finding and writing runs, registering versions, moving aliases."""

from __future__ import annotations

import csv
import json
import tempfile
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

from stages.checkout.redaction import redact
from stages.params.schema import PublishSection

SQLITE = "sqlite:///"

BATCH = 100
"""Params, metrics or tags per request; MLflow accepts at most 100 params or tags."""

CURVE = "curve."
"""Prefix of the metrics that have one value per logged step."""

TRAINING_TAG = "sft.training_digest"
"""Tag by which `publish` finds the run that a training started; set when the training has ended."""

PROGRESS_TAG, PUBLISHED = "sft.progress", "published"

KIND_TAG, SWEEP = "sft.kind", "sweep"
"""Tag of a run that is the parent of a sweep's results."""

# MLflow's page shows the runs as trainings rather than as evaluations of a prompt
KIND = {"mlflow.experimentKind": "custom_model_development"}


def open_tracking(section: PublishSection, home: Path) -> Tracking:
    """Open the tracking store and its experiment, and create or restore the experiment if necessary.

    Args:
        section: Section `publish` of params.yaml.
        home: The main checkout, which contains the artifacts and a SQLite file given by a relative path, even if the
            run works in a worktree.

    Raises:
        ValueError: The store can't be reached or used.
    """
    uri = absolute_uri(section.tracking_uri, home)
    # a tracking server decides itself where artifacts are stored
    local = uri.startswith(SQLITE)
    location = (home / "mlartifacts" / section.experiment).as_uri() if local else None
    # MLflow resolves the URI of a logged model with the global store, not with the client's
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
    """Make the path of a SQLite URI absolute, relative to `home`; other URIs are returned unchanged."""
    if not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_absolute():
        return uri
    return f"{SQLITE}{home / uri.removeprefix(SQLITE)}"


@dataclass(frozen=True)
class Tracking:
    """An open tracking store and experiment.

    Args:
        client: Client of the store.
        uri: Address of the store.
        experiment_id: Id of the experiment.
    """

    client: MlflowClient
    uri: str
    experiment_id: str

    def find_run(self, tag: str, value: str) -> str | None:
        """Return the id of the oldest finished run with this tag; None if there is none."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC"],
        )
        return runs[0].info.run_id if runs else None

    def find_unfinished(self, tag: str, value: str) -> list[str]:
        """Return the ids of the runs with this tag that are running, failed or killed; the newest first."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` = '{value}' and attributes.status != 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time DESC"],
        )
        return [run.info.run_id for run in runs]

    @contextmanager
    def whole_run(self, name: str, tags: Mapping[str, str], begun: str | None = None) -> Iterator[RunWriter]:
        """Write a run in the block; it is finished when the block ends, and failed if the block raises.

        Args:
            name: Name of the run.
            tags: Tags that are set before the block.
            begun: Id of a run that a training started, to be completed; None = create a run.
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
        """Find the version of a registered model for this run, or create it.

        The version points to a logged model without files, as DVC stores the weights.

        Args:
            name: Name of the registered model, which is created if it does not exist.
            run_id: Id of the result's run.
            tags: Tags of the version.
            metrics: Metrics of the logged model.
            key: Name of the tag that identifies the result.

        Returns:
            Number of the version.
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
    """Writes to one run.

    Args:
        client: Client of the store.
        run_id: Id of the run.
    """

    client: MlflowClient
    run_id: str

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params; values other than strings are logged as JSON."""
        texts = {name: redact(value if isinstance(value, str) else json.dumps(value)) for name, value in params.items()}
        for start in range(0, len(texts), BATCH):
            chunk = list(texts.items())[start : start + BATCH]
            self.client.log_batch(self.run_id, params=[Param(name, text) for name, text in chunk])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log metrics with one value each."""
        now = int(time.time() * 1000)
        values = [Metric(name, value, now, 0) for name, value in metrics.items()]
        for start in range(0, len(values), BATCH):
            self.client.log_batch(self.run_id, metrics=values[start : start + BATCH])

    def log_curve(self, path: Path) -> None:
        """Log the columns of a CSV file as metrics `curve.<column>` over `step`, without the points the run has."""
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
        """Log points of curves, in batches."""
        for start in range(0, len(points), 10 * BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + 10 * BATCH])

    def points(self, prefix: str) -> list[Metric]:
        """Return all points of the metrics whose names start with a prefix."""
        names = [name for name in self.client.get_run(self.run_id).data.metrics if name.startswith(prefix)]
        return [point for name in names for point in self.client.get_metric_history(self.run_id, name)]

    def log_data(self, digests: Mapping[str, str]) -> None:
        """Log data files as data sets of MLflow, by name and digest."""
        inputs = [
            DatasetInput(Dataset(name, digest[:36], "local", json.dumps({"path": name, "sha256": digest})))
            for name, digest in digests.items()
        ]
        if inputs:
            self.client.log_inputs(self.run_id, datasets=inputs)

    def log_file(self, path: Path, folder: str) -> None:
        """Log a file as an artifact in a folder of the run; secrets in a text file are replaced."""
        content = path.read_bytes()
        try:
            shown = redact(content.decode("utf-8")).encode("utf-8")
        except UnicodeDecodeError:
            shown = content
        with tempfile.TemporaryDirectory() as copies:
            sent = path if shown == content else Path(copies) / path.name
            if sent != path:
                sent.write_bytes(shown)
            self.client.log_artifact(self.run_id, str(sent), folder)

    def set_tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self.client.set_tag(self.run_id, key, redact(value))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        for start in range(0, len(tags), BATCH):
            chunk = list(tags.items())[start : start + BATCH]
            self.client.log_batch(self.run_id, tags=[RunTag(key, redact(str(value))) for key, value in chunk])
