"""The curve of a training: its columns, tokens per second, progress lines, and the run in MLflow while it trains.

Tokens per second depend on the machine, so they are written to reports/timings and to MLflow but not to an out of DVC.
"""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from stages.checkout.artifacts import write_text
from stages.checkout.paths import Paths, main_checkout
from stages.params.schema import Params
from stages.progress import FIGURES_SHOWN, progress
from stages.tracking import lineage
from stages.tracking.lineage import machine_tags
from stages.tracking.trackers import MLFLOW, TrackedRun, Trackers
from stages.training.checkpoints import TrainingState, fingerprint_params
from stages.training.out_of_memory import describe_events
from stages.training.selection import SAMPLE_PREFIX

if TYPE_CHECKING:
    from stages.tracking.live_run import LiveRun

CURVE_COLUMNS = (
    "step",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "mean_token_accuracy",
    "eval_mean_token_accuracy",
    "num_input_tokens_seen",
)

ROUTER_COLUMNS = ("aux_loss", "eval_aux_loss")
"""Columns of the load-balancing loss of a mixture of experts, in curves of trainings that have it."""

SOURCE_PREFIX = "eval_loss/source/"
"""Beginning of the columns with the loss on held-out rows of one source, in curves of trainings with several."""

SPEED = "tokens_per_second"

MEMORY_TAG = "sft.out_of_memory"

SWITCH, ON, OFF = "SFT_LIVE_RUN", "on", "off"


def curve_csv(history: list[dict[str, Any]]) -> str:
    """Return the trainer's log as CSV: one row per step, with empty cells for figures not logged at that step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(entry["step"], {}).update(entry)
    file = io.StringIO()
    more = [column for column in ROUTER_COLUMNS if any(column in entry for entry in history)]
    more += [*source_columns(history), *sample_columns(history)]
    writer = csv.DictWriter(file, [*CURVE_COLUMNS, *more], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps) if {"loss", "eval_loss"} & set(steps[step]))
    return file.getvalue()


def source_columns(history: list[dict[str, Any]]) -> list[str]:
    """Return the sorted names of the losses of single sources in the trainer's log; none if there is one source."""
    return sorted({name for entry in history for name in entry if name.startswith(SOURCE_PREFIX)})


def sample_columns(history: list[dict[str, Any]]) -> list[str]:
    """Return the sorted names of the figures of answers in the trainer's log; checkpoints do not keep their order."""
    return sorted({name for entry in history for name in entry if name.startswith(SAMPLE_PREFIX)})


class Throughput(TrainerCallback):
    """Clock of a training: tokens per second at each point of the curve.

    Only optimizer steps are timed for the tokens per second, not the evaluations and checkpoints between them. Other
    callbacks read their times here, so this one must precede them in the trainer's list.

    Args:
        file: CSV file that keeps the points while the training is unfinished, for a resumed training to continue.

    Attributes:
        points: Pairs of step and tokens per second.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.points: list[tuple[int, float]] = []
        self._seconds, self._tokens, self._step_began = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the points up to the step that the training starts from."""
        points = read_points(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        self.points = [point for point in points if point[0] <= state.global_step]
        self._seconds, self._tokens, self._step_began = 0.0, state.num_input_tokens_seen, time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the step."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the step's time."""
        self._seconds += time.monotonic() - self._step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Add a point where a training loss is logged."""
        tokens = state.num_input_tokens_seen - self._tokens
        if not logs or "loss" not in logs or not self._seconds or not tokens:
            return
        self.points.append((state.global_step, tokens / self._seconds))
        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        if state.is_world_process_zero:
            write_text(self._file, self.as_csv())

    def as_csv(self) -> str:
        """Return all points as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("step", SPEED), *((step, round(speed, 1)) for step, speed in self.points)])
        return text.getvalue()

    def speed_at(self, step: int) -> float | None:
        """Return the tokens per second of the newest point; None if it is not at this step."""
        return self.points[-1][1] if self.points and self.points[-1][0] == step else None


def read_points(text: str) -> list[tuple[int, float]]:
    """Parse the points of a CSV file written by `Throughput`."""
    return [(int(row["step"]), float(row[SPEED])) for row in csv.DictReader(io.StringIO(text))]


class TrainingProgress(TrainerCallback):
    """Callback that shows the step, and from each point of the curve the losses, learning rate, speed and memory.

    Args:
        throughput: Clock of the training.
    """

    def __init__(self, throughput: Throughput) -> None:
        self._throughput = throughput
        self._figures: dict[str, float] = {}
        self._num_evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step that the training starts from: not 0 if it is resumed."""
        if state.is_world_process_zero:
            self._show(state, "" if state.global_step == 0 else "resumed")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step."""
        if state.is_world_process_zero and not control.should_log:
            self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show a point of the curve."""
        if not state.is_world_process_zero or not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        self._figures |= {name: float(logs[name]) for name in FIGURES_SHOWN if name in logs}
        speed = self._throughput.speed_at(state.global_step)
        if speed is not None:
            self._figures[SPEED] = speed
        self._figures["memory_gb"] = peak_memory() / 1e9
        self._show(state, point=True)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Show how far the evaluation is."""
        self._num_evaluated += 1
        if state.is_world_process_zero and has_length(eval_dataloader):
            self._show(state, f"evaluating: {self._num_evaluated} of {len(eval_dataloader)} batches")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the batches of the next evaluation from 0."""
        self._num_evaluated = 0

    def _show(self, state: Any, text: str = "", point: bool = False) -> None:
        progress(state.global_step, state.max_steps, "steps", text, figures=dict(self._figures), point=point)


def peak_memory() -> int:
    """Return the peak bytes that this process has allocated on its accelerator, or its present bytes of main memory."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


@contextmanager
def live_run(params: Params, paths: Paths, state: TrainingState, first_process: bool) -> Iterator[LiveRun | None]:
    """Record this training in MLflow while the block runs, and set the run's final status after it.

    Args:
        params: Of the training.
        paths: The checkout.
        state: Folder of the training's checkpoints.
        first_process: Whether this process is the one that records.

    Yields:
        The run; None in other processes, or if the environment variable SFT_LIVE_RUN is `off`.

    Raises:
        ValueError: SFT_LIVE_RUN has another value than `on` or `off`.
    """
    switch = os.environ.get(SWITCH, ON)
    if switch not in (ON, OFF):
        raise ValueError(f"{SWITCH}={switch!r}: it must be `{ON}` or `{OFF}`")
    if switch == OFF or not first_process:
        yield None
        return
    run = _open_run(params, paths, state)
    try:
        yield run
    except Exception:
        run.ended("FAILED")
        raise
    except BaseException:
        run.ended("KILLED")
        raise
    run.trained(lineage.training_digest(params, paths))


def _open_run(params: Params, paths: Paths, state: TrainingState) -> LiveRun:
    # imported here, as launched processes that record nothing need not load MLflow
    from stages.tracking.live_run import LiveRun
    from stages.tracking.store import open_tracking

    home = main_checkout(paths.root)
    fixed = {"model": params.model.model_dump(), "train": fingerprint_params(params.train)}
    stated = lineage.result_params(params)
    tags = {
        "mlflow.source.name": "python -m stages train",
        **lineage.circumstances(paths),
        **machine_tags(),
    }
    if events := describe_events(state):
        tags[MEMORY_TAG] = events
    return LiveRun(
        lambda: open_tracking(params.publish, home),
        state.folder,
        f"{lineage.model_name(paths)}-unfinished",
        {name: value for name, value in lineage.flatten(fixed).items() if name in stated},
        tags,
    )


@contextmanager
def open_trackers(params: Params, paths: Paths, state: TrainingState, first_process: bool) -> Iterator[Trackers | None]:
    """Open the trackers of `train.report_to` while the block runs.

    Args:
        params: Of the training.
        paths: The checkout.
        state: Folder of the training's checkpoints.
        first_process: Whether this process is the one that records.

    Yields:
        The trackers; None in other processes, or if params.yaml states none but MLflow.
    """
    names = [name for name in params.train.report_to if name != MLFLOW]
    if not names or not first_process:
        yield None
        return
    fixed = {"model": params.model.model_dump(), "train": fingerprint_params(params.train)}
    run = TrackedRun(
        name=re.sub(r"[^\w.-]", "-", f"{lineage.model_name(paths)}-{state.folder.name}"),
        project=params.publish.experiment,
        params=lineage.flatten(fixed),
        folder=paths.state / "trackers",
        state=state.folder,
    )
    trackers = Trackers(names, run)
    try:
        yield trackers
    finally:
        trackers.close()


class LiveCurve(TrainerCallback):
    """Callback that sends the figures of each log line to a training's run, with the tokens per second.

    Args:
        run: Run of the training in MLflow, or in other trackers.
        throughput: Clock of the training.
    """

    def __init__(self, run: LiveRun | Trackers, throughput: Throughput) -> None:
        self._run, self._throughput = run, throughput

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send the log up to the checkpoint that the training is resumed from; points in the run are not sent again."""
        for entry in state.log_history:
            self._send(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Send what has just been logged."""
        if not logs or not ({"loss", "eval_loss"} & set(logs) or sample_columns([logs])):
            return
        speed = self._throughput.speed_at(state.global_step) if "loss" in logs else None
        self._send(logs if speed is None else {**logs, SPEED: speed}, state.global_step)

    def _send(self, entry: Mapping[str, Any], step: int) -> None:
        by_name = [*source_columns([dict(entry)]), *sample_columns([dict(entry)])]
        names = (*CURVE_COLUMNS, *ROUTER_COLUMNS, *by_name, SPEED)
        figures = {name: float(entry[name]) for name in names if name != "step" and name in entry}
        self._run.log(figures, step, int(time.time() * 1000))
