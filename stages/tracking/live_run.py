"""A training's run in MLflow while it trains, sent by a thread of its own, so that no store can hold the training up.

`publish` completes the run. Until then it is unfinished by its status and by its tag `sft.progress`.
"""

from __future__ import annotations

import logging
import os
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
from stages.tracking.store import CURVE, PROGRESS_TAG, TRAINING_TAG, RunWriter, Tracking

KEY_FILE, KEY_TAG = "live_run.json", "sft.live_key"
"""What ties checkpoints and run together: a key that lies with the checkpoints and is made together with the run."""

RETRY_S = 30.0
LAST_CALL_S, SHORT_CALL_S = 15.0, 2.0
"""How long the end of a training waits for what is still to be sent: a good end, and one in a hurry."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class LiveRun:
    """One training's run, found again when the training is resumed.

    Args:
        open_store: Opens the tracking store; called by the thread, again and again while it fails.
        folder: The training's checkpoints.
        name: What the run is called until it is published.
        params: What can't change between two attempts of the same training.
        tags: Circumstances, those of the last attempt.
    """

    def __init__(
        self,
        open_store: Callable[[], Tracking],
        folder: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        for chatter in ("mlflow", "urllib3", "alembic"):  # what is wrong is said once, by `_complain`
            logging.getLogger(chatter).setLevel(logging.ERROR)
        self._open_store, self._folder, self._name, self._params = open_store, folder, name, params
        self._points: list[Metric] = []
        self._tags = {**tags, PROGRESS_TAG: "training"}
        self._status: str | None = None
        self._last_steps: dict[str, int] = {}
        self._run: RunWriter | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._complained = False
        self._lock = threading.Lock()  # of what is handed over
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="live-run", daemon=True)
        self._wake.set()
        self._thread.start()

    def log(self, figures: Mapping[str, float], step: int, time_ms: int) -> None:
        """Hand over points of the curve; those that the run has already are left out."""
        with self._lock:
            self._points += [Metric(f"{CURVE}{name}", value, time_ms, step) for name, value in figures.items()]
        self._wake.set()

    def tag(self, name: str, value: str) -> None:
        """Hand over a tag."""
        with self._lock:
            self._tags[name] = value
        self._wake.set()

    def trained(self, digest: str) -> None:
        """The training has ended well: the run waits for the rest of the pipeline, and is found by the digest."""
        with self._lock:
            self._tags |= {PROGRESS_TAG: "trained, not published", TRAINING_TAG: digest}
        self._close(LAST_CALL_S)

    def ended(self, status: str) -> None:
        """The training has ended otherwise: FAILED or KILLED."""
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
                self._deliver()
                if last_call:
                    self._leave()
            except Exception as error:  # whatever a store may raise: the training goes on
                self._complain(error)
                self._closing.wait(RETRY_S)

    def _deliver(self) -> None:
        run = self._run = self._run or self._open()
        with self._lock:
            points, tags = self._points[:], dict(self._tags)
        run.log_points([point for point in points if point.step > self._last_steps.get(point.key, -1)])
        run.set_tags(tags)
        with self._lock:  # only now: what could not be sent is sent with the next
            del self._points[: len(points)]
            self._tags = {name: value for name, value in self._tags.items() if tags.get(name) != value}

    def _open(self) -> RunWriter:
        tracking = self._open_store()
        key, found = self._key(tracking)
        if found is None:
            run = tracking.client.create_run(tracking.experiment_id, run_name=self._name, tags={KEY_TAG: key})
            found = run.info.run_id
        writer = RunWriter(tracking.client, found)
        writer.log_params(self._params)
        tracking.client.update_run(found, status="RUNNING")
        for point in writer.points(CURVE):
            self._last_steps[point.key] = max(point.step, self._last_steps.get(point.key, -1))
        self._monitor = SystemMetricsMonitor(found, resume_logging=True, tracking_uri=tracking.uri)
        self._monitor.start()
        return writer

    def _key(self, tracking: Tracking) -> tuple[str, str | None]:
        """The key, and the unfinished run that was made with it.

        It is written before the run is made: a kill in between leaves no run that nobody finds again.
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

    def _leave(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
        if self._status is not None and self._run is not None:
            self._run.client.set_terminated(self._run.run_id, self._status)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            reason = redact(" ".join(str(error).split()))[:300]
            message = f"warning: the curve can't be shown in MLflow while it grows, `publish` records it: {reason}"
            print(message, file=sys.stderr, flush=True)
        self._complained = True
