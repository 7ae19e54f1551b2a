"""Tracking store (MLflow): opening it, finding and writing runs, registering versions, moving aliases."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry
from mlflow.utils.validation import MAX_DATASET_NAME_SIZE, MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

from stages.checkout.artifacts import write_text
from stages.checkout.redaction import redact
from stages.params.schema import PublishSection
from stages.tracking.address import (
    ANSWER_S,
    KEY,
    SQLITE,
    VIEW_TAG,
    absolute_uri,
    answered_in_time,
    check_database,
    database,
    has_ended,
    is_remote,
    locked_store,
    this_process,
)
from stages.tracking.lineage import PARENT_TAG

BATCH = 100
"""Params, metrics or tags per request; MLflow accepts at most 100 params or tags."""

CURVE = ("train/", "eval/", "sample/")
"""Prefixes of the metrics that have one value per logged step, by which MLflow's pages group their charts."""

TRAINING_TAG = "sft.training_digest"
"""Tag by which `publish` finds the run that a training started; set when the training has ended."""

PROGRESS_TAG, PUBLISHED = "sft.progress", "published"

KIND_TAG, SWEEP = "sft.kind", "sweep"
"""Tag of a run that is the parent of a sweep's results."""

PROCESS_TAG = "sft.process"
"""Tag with the process that writes a run. A run with status RUNNING whose process has ended was interrupted."""

TRAINED = "trained, not published"
"""Value of `PROGRESS_TAG` of a run that waits for `publish`, without a process."""

NOTE_TAG = "mlflow.note.content"

GATE_TAG = "sft.gate"

MAX_DESCRIPTION = 5000
"""Characters of a description that every store of MLflow accepts."""

LONG_VALUES = "long_values"
"""Folder of a run's artifacts with the values that are longer than MLflow allows, in files named by their SHA-256."""

HASHES, HASHES_TAG = "lineage/dvc_hashes.json", "sft.dvc_hashes"
"""Artifact of a run with the DVC hashes of its data and results by path, and the tag of a run that has it."""


def curve_metric(column: str) -> str:
    """Return the metric of a column of the curve: `train/loss` of `loss`, `eval/loss` of `eval_loss`."""
    kind, _, name = column.partition("_")
    return f"{kind}/{name}" if f"{kind}/" in CURVE and name else f"train/{column}"


_LONG = re.compile(r"^sha256:([0-9a-f]{64}) \(\d+ characters, in artifact \S+\)$")

_NOT_IN_NAMES = re.compile(r"[^/\w.\- :]")
"""Characters that MLflow does not allow in names of tags."""

# MLflow's page shows the runs as trainings rather than as evaluations of a prompt
KIND = {"mlflow.experimentKind": "custom_model_development"}


def open_tracking(section: PublishSection, home: Path) -> Tracking:
    """Open the tracking store and its experiment, and create or restore the experiment if necessary.

    Args:
        section: Section `publish` of params.yaml.
        home: The main checkout, which contains the artifacts and a SQLite file given by a relative path, even if the
            run works in a worktree.

    Raises:
        ValueError: The store can't be reached or used, or does not answer within 25 s.
    """
    uri = absolute_uri(section.tracking_uri, home)
    # a tracking server decides itself where artifacts are stored
    location = None if database(uri) is None else (home / "mlartifacts" / section.experiment).as_uri()

    def find_experiment() -> Tracking:
        create_database(uri)
        client = _client(uri)
        experiment = client.get_experiment_by_name(section.experiment)
        if experiment is None:
            return Tracking(client, uri, _create_experiment(client, section.experiment, location))
        if experiment.lifecycle_stage != "active":
            client.restore_experiment(experiment.experiment_id)
        return Tracking(client, uri, experiment.experiment_id)

    if (file := database(uri)) is not None:
        check_database(file)
    with locked_store(uri):
        return answered_in_time(section.tracking_uri, find_experiment, seconds=_limit(uri))


def create_database(uri: str) -> None:
    """Create the tables of a SQLite store that does not exist yet: all of them or, on a full disk or a kill, no file.

    MLflow creates them one by one in the file itself, and refuses a store that has a part of them ever after.

    Args:
        uri: Absolute address of the store; nothing is done for one that exists, or that is not a SQLite file.
    """
    file = database(uri)
    if file is None:
        return
    with locked_store(uri):
        if file.exists() and file.stat().st_size:
            return
        new = file.with_name(f"{file.name}.new")
        for left in (new, *(new.with_name(f"{new.name}{suffix}") for suffix in ("-journal", "-wal", "-shm"))):
            left.unlink(missing_ok=True)
        engine = create_sqlalchemy_engine_with_retry(f"{SQLITE}{new}")
        try:
            _initialize_tables(engine)
        finally:
            engine.dispose()
        new.replace(file)


def check_store(section: PublishSection, home: Path) -> None:
    """Check that a tracking store which is not a SQLite file can be reached and used, without changing it.

    Raises:
        ValueError: It can't be used, or does not answer within 25 s.
    """
    uri = absolute_uri(section.tracking_uri, home)
    answered_in_time(section.tracking_uri, lambda: _client(uri).get_experiment_by_name(section.experiment))


def _client(uri: str) -> MlflowClient:
    # MLflow resolves the URI of a logged model with the global store, not with the client's
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_experiment(client: MlflowClient, name: str, location: str | None) -> str:
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=KIND))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(name).experiment_id)  # another machine was faster


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
        """Return the id of the finished run with this tag that ended first; None if there is none."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.end_time ASC"],
        )
        return runs[0].info.run_id if runs else None

    def newest_params(self, tag: str) -> dict[str, str] | None:
        """Return the params of the finished run with this tag that ended last; None if there is none."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{tag}` != '' and attributes.status = 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.end_time DESC"],
            max_results=1,
        )
        return dict(runs[0].data.params) if runs else None

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
        process = {PROCESS_TAG: this_process()}
        if begun is None:
            begun = self.client.create_run(self.experiment_id, run_name=name, tags=process).info.run_id
        else:
            self.client.set_tag(begun, PROCESS_TAG, process[PROCESS_TAG])
            self.client.update_run(begun, status="RUNNING", name=name)
        writer = RunWriter(self.client, begun)
        try:
            writer.set_tags(tags)
            yield writer
        except BaseException:
            self.client.set_terminated(writer.run_id, "FAILED")
            raise
        self.client.set_terminated(writer.run_id, "FINISHED")

    def end_interrupted(self) -> None:
        """Set the status of runs to KILLED that are shown as running although their process has ended.

        A training that is resumed, or a result that is published, continues its run all the same. A run that waits for
        `publish` is left as it is, unless it belongs to a sweep that has ended.
        """
        running = self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'")
        dead = [run for run in running if has_ended(run.data.tags.get(PROCESS_TAG, ""))]
        for run in sorted(dead, key=lambda run: run.data.tags.get(KIND_TAG) != SWEEP):  # sweeps before their trials
            if run.data.tags.get(PROGRESS_TAG) != TRAINED or self._is_of_ended_sweep(run):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _is_of_ended_sweep(self, run: Run) -> bool:
        parent = run.data.tags.get(PARENT_TAG)
        return parent is not None and self.client.get_run(parent).info.status != "RUNNING"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the store for a block; see `locked_store`.

        Raises:
            ValueError: The store refused a request or stopped answering within the block.
        """
        with locked_store(self.uri):
            try:
                yield
            except MlflowException as error:
                reason = redact(" ".join(str(error).split()))[:400]
                raise ValueError(
                    f"{KEY} {redact(self.uri)!r}: {reason}. What was recorded so far is completed when the command is "
                    "typed again"
                ) from error

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
        known = self._versions(name, run_id, key, tags[key])
        if known:
            return known[0]
        logged = re.sub(r"[./:%\"']", "-", name)  # characters that a registered model may have, and this may not
        model = self.client.create_logged_model(self.experiment_id, name=logged, source_run_id=run_id, tags=dict(tags))
        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(metric, value, now, 0, model_id=model.model_id) for metric, value in metrics.items()],
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        created = self.client.create_model_version(
            name, source=f"models:/{model.model_id}", run_id=run_id, tags=dict(tags), model_id=model.model_id
        )
        first = self._versions(name, run_id, key, tags[key])[0]
        if first != str(created.version):  # another machine created one between the search and the creation
            self.client.delete_model_version(name, created.version)
        return first

    def _versions(self, name: str, run_id: str, key: str, value: str) -> list[str]:
        """Return the numbers of the versions of a model for a run and a tag, in ascending order."""
        found = self.client.search_model_versions(f"run_id = '{run_id}'")
        numbers = [int(each.version) for each in found if each.name == name and each.tags.get(key) == value]
        return [str(number) for number in sorted(numbers)]

    def describe(self, name: str, version: str, card: str, is_champion: bool) -> None:
        """Show a model card as the description of a version and, if it is the champion, of its registered model."""
        text = redact(card)[:MAX_DESCRIPTION]
        self.client.update_model_version(name, version, description=text)
        if is_champion:
            self.client.update_registered_model(name, description=text)

    def show_columns(self, metrics: Sequence[str]) -> None:
        """Let the view `VIEW` of the table of runs show the gate and some metrics; `make ui` links to that view."""
        columns = ["attributes.`Created`", f"tags.`{GATE_TAG}`", *(f"metrics.`{name}`" for name in metrics)]
        view = json.dumps({"selectedColumns": columns})
        if self.client.get_experiment(self.experiment_id).tags.get(VIEW_TAG) != view:
            self.client.set_experiment_tag(self.experiment_id, VIEW_TAG, view)

    def page(self, run_id: str, file: str) -> str:
        """Return the link to an artifact of a run, relative to any of MLflow's pages."""
        place = f"#/experiments/{self.experiment_id}/runs/{run_id}/artifacts/{file}"
        return f"{place}?workflowType=machine_learning"

    def add_to_note(self, run_id: str, line: str) -> None:
        """Add a line to the note of a run, if the note does not have it yet."""
        note = self.client.get_run(run_id).data.tags.get(NOTE_TAG, "")
        if line not in note.splitlines():
            self.client.set_tag(run_id, NOTE_TAG, f"{note}{line}\n")

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
        """Log params; values other than strings are logged as JSON, and long ones as artifacts."""
        texts = {name: redact(value if isinstance(value, str) else json.dumps(value)) for name, value in params.items()}
        for start in range(0, len(texts), BATCH):
            chunk = list(texts.items())[start : start + BATCH]
            entries = [Param(name, self._short(text, MAX_PARAM_VAL_LENGTH)) for name, text in chunk]
            self.client.log_batch(self.run_id, params=entries)

    def _short(self, text: str, limit: int) -> str:
        """Return a text as it is, or if MLflow would cut it, log it as an artifact and return its digest."""
        if len(text) <= limit:
            return text
        digest = hashlib.sha256(text.encode()).hexdigest()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{digest}.txt"
            write_text(file, text)
            self.log_file(file, folder=LONG_VALUES)
        return f"sha256:{digest} ({len(text)} characters, in artifact {LONG_VALUES}/{file.name})"

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log metrics with one value each."""
        now = int(time.time() * 1000)
        values = [Metric(name, value, now, 0) for name, value in metrics.items()]
        for start in range(0, len(values), BATCH):
            self.client.log_batch(self.run_id, metrics=values[start : start + BATCH])

    def log_curve(self, path: Path) -> None:
        """Log the columns of a CSV file as metrics (see `curve_metric`) over `step`, without the points the run has."""
        now = int(time.time() * 1000)
        with path.open(encoding="utf-8", newline="") as file:
            values = [
                Metric(curve_metric(name), float(value), now, int(row["step"]))
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

    def points(self, prefixes: tuple[str, ...]) -> list[Metric]:
        """Return all points of the metrics whose names start with one of several prefixes."""
        names = [name for name in self.client.get_run(self.run_id).data.metrics if name.startswith(prefixes)]
        return [point for name in names for point in self.client.get_metric_history(self.run_id, name)]

    def log_data(self, digests: Mapping[str, str]) -> None:
        """Log data files as data sets of MLflow, by name and digest."""
        inputs = [
            DatasetInput(Dataset(_data_name(name), digest[:36], "local", json.dumps({"path": name, "sha256": digest})))
            for name, digest in digests.items()
        ]
        if inputs:
            self.client.log_inputs(self.run_id, datasets=inputs)

    def log_file(self, path: Path, folder: str, name: str | None = None) -> None:
        """Log a file as an artifact in a folder of the run; secrets in a text file are replaced.

        Args:
            path: The file.
            folder: Folder of the run's artifacts.
            name: Name of the artifact; None = that of the file.
        """
        content = path.read_bytes()
        try:
            shown = redact(content.decode("utf-8")).encode("utf-8")
        except UnicodeDecodeError:
            shown = content
        with tempfile.TemporaryDirectory() as copies:
            sent = path if shown == content and name in (None, path.name) else Path(copies) / (name or path.name)
            if sent != path:
                sent.write_bytes(shown)
            self.client.log_artifact(self.run_id, str(sent), folder)

    def set_tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; long values are logged as artifacts, and characters that names can't have become `_`."""
        for start in range(0, len(tags), BATCH):
            chunk = list(tags.items())[start : start + BATCH]
            entries = [
                RunTag(_NOT_IN_NAMES.sub("_", key), self._short(redact(str(value)), MAX_TAG_VAL_LENGTH))
                for key, value in chunk
            ]
            self.client.log_batch(self.run_id, tags=entries)


def whole_value(client: MlflowClient, run_id: str, value: str) -> str:
    """Return a recorded value, read from the run's artifacts if it was too long for MLflow.

    Args:
        client: Client of the store.
        run_id: Id of the run.
        value: Value of a param or a tag.
    """
    long = _LONG.match(value)
    if long is None:
        return value
    with tempfile.TemporaryDirectory() as folder:
        file = client.download_artifacts(run_id, f"{LONG_VALUES}/{long[1]}.txt", folder)
        return Path(file).read_text(encoding="utf-8")


def _data_name(name: str) -> str:
    """Return the name of a data file, shortened to what MLflow allows, with a digest to tell it from others."""
    if len(name) <= MAX_DATASET_NAME_SIZE:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: MAX_DATASET_NAME_SIZE - len(digest) - 4]}... {digest}"


def _limit(uri: str) -> float | None:
    """Return the seconds that a store has to answer: a new SQLite file may take longer, but can't be unreachable."""
    return ANSWER_S if is_remote(uri) else None
