"""Run of a training in MLflow, written by a background thread while the model trains.

The training never waits for the store. `publish` completes the run; until then its status and its tag `sft.progress`
show that it is unfinished.
"""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from stages.checkout.artifacts import read_json, write_json
from stages.checkout.redaction import redact
from stages.tracking.address import this_process
from stages.tracking.store import (
    CURVE,
    PROCESS_TAG,
    PROGRESS_TAG,
    TRAINED,
    TRAINING_TAG,
    RunWriter,
    Tracking,
    curve_metric,
)

KEY_FILE, KEY_TAG = "live_run.json", "sft.live_key"
"""File with the checkpoints, and tag of the run: both contain the key by which a resumed training finds its run."""

RETRY_S = 30.0
"""Seconds between two attempts to reach the store."""

LAST_CALL_S, SHORT_CALL_S = 15.0, 2.0
"""Seconds that the process waits at its end for unsent points: after a complete training, and after any other."""


class LiveRun:
    """Run of one training; a resumed training continues its run.

    Args:
        open_store: Opens the tracking store. The thread calls it until it succeeds.
        folder: Folder of the training's checkpoints.
        name: Name of the run until it is published.
        params: Params that are equal in all attempts of the training.
        tags: Tags of the run; those of a resumed training replace earlier ones.
    """

    def __init__(
        self,
        open_store: Callable[[], Tracking],
        folder: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        for package in ("mlflow", "urllib3", "alembic"):  # `_warn_once` reports a failure instead
            logging.getLogger(package).setLevel(logging.ERROR)
        self._open_store, self._folder, self._name, self._params = open_store, folder, name, params
        self._points: list[Metric] = []
        self._tags = {**tags, PROGRESS_TAG: "training"}
        self._status: str | None = None
        self._last_steps: dict[str, int] = {}
        self._run: RunWriter | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._has_warned = False
        self._lock = threading.Lock()  # guards the points and tags that are not sent yet
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="live-run", daemon=True)
        self._wake.set()
        self._thread.start()

    def log(self, figures: Mapping[str, float], step: int, time_ms: int) -> None:
        """Queue points of the curve; those that the run already has are not sent.

        Args:
            figures: Name of a metric -> value.
            step: Optimizer step.
            time_ms: Milliseconds since 1970.
        """
        with self._lock:
            self._points += [Metric(curve_metric(name), value, time_ms, step) for name, value in figures.items()]
        self._wake.set()

    def tag(self, name: str, value: str) -> None:
        """Queue a tag."""
        with self._lock:
            self._tags[name] = value
        self._wake.set()

    def trained(self, digest: str) -> None:
        """Mark the training as complete; `publish` finds the run by the digest of the training."""
        with self._lock:
            self._tags |= {PROGRESS_TAG: TRAINED, TRAINING_TAG: digest}
        self._close(LAST_CALL_S)

    def ended(self, status: str) -> None:
        """End the run of an incomplete training with status FAILED or KILLED."""
        self._status = status
        self._close(SHORT_CALL_S)

    def _close(self, patience_s: float) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(patience_s)

    def _work(self) -> None:
        last_call = False
        while not last_call:
            self._wake.wait()
            self._wake.clear()
            last_call = self._closing.is_set()
            try:
                self._send()
                if last_call:
                    self._finish()
            except Exception as error:  # the store may raise anything, and training must continue
                self._warn_once(error)
                self._closing.wait(RETRY_S)

    def _send(self) -> None:
        run = self._run = self._run or self._open()
        with self._lock:
            points, tags = self._points[:], dict(self._tags)
        run.log_points([point for point in points if point.step > self._last_steps.get(point.key, -1)])
        run.set_tags(tags)
        with self._lock:  # not earlier, so that points are sent again after a failure
            del self._points[: len(points)]
            self._tags = {name: value for name, value in self._tags.items() if tags.get(name) != value}

    def _open(self) -> RunWriter:
        tracking = self._open_store()
        key, found = self._key(tracking)
        if found is None:
            tags = {KEY_TAG: key, PROCESS_TAG: this_process()}
            found = tracking.client.create_run(tracking.experiment_id, run_name=self._name, tags=tags).info.run_id
        writer = RunWriter(tracking.client, found)
        writer.set_tag(PROCESS_TAG, this_process())
        writer.log_params(self._params)
        tracking.client.update_run(found, status="RUNNING")
        for point in writer.points(CURVE):
            self._last_steps[point.key] = max(point.step, self._last_steps.get(point.key, -1))
        self._monitor = SystemMetricsMonitor(found, resume_logging=True, tracking_uri=tracking.uri)
        self._monitor.start()
        return writer

    def _key(self, tracking: Tracking) -> tuple[str, str | None]:
        """Return the key, and the id of the unfinished run with this key if there is one.

        The key is written before the run is created, so that the run can be found even after a kill in between.
        """
        file = self._folder / KEY_FILE
        if file.exists():
            key = str(read_json(file)["key"])
            found = tracking.find_unfinished(KEY_TAG, key)
            if found or not tracking.find_run(KEY_TAG, key):
                return key, found[0] if found else None
        key = uuid.uuid4().hex
        write_json(file, {"key": key})
        return key, None

    def _finish(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
        if self._status is not None and self._run is not None:
            self._run.client.set_terminated(self._run.run_id, self._status)

    def _warn_once(self, error: Exception) -> None:
        if not self._has_warned:
            reason = redact(" ".join(str(error).split()))[:300]
            message = (
                f"warning: the curve can't be sent to MLflow while the model trains, `publish` records it: {reason}"
            )
            print(message, file=sys.stderr, flush=True)
        self._has_warned = True
