"""TensorBoard, Weights & Biases and Trackio beside MLflow: they get the curve of a training while it runs.

MLflow has the record in any case. What the others write lies outside the outs of DVC, since it contains times.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from stages.checkout.artifacts import read_json, write_json
from stages.checkout.redaction import redact

MLFLOW = "mlflow"

PACKAGES = ("tensorboard", "wandb", "trackio")
"""Trackers beside MLflow. Each is a package of the same name."""

INSTALL = {"tensorboard": "'.[tensorboard]'", "wandb": "'.[wandb]'", "trackio": "trackio"}
"""Tracker -> what pip installs."""

SENT = "trackers.json"
"""File with the checkpoints: tracker -> figure -> last step sent, so that a resumed training repeats no point."""


@dataclass(frozen=True)
class TrackedRun:
    """A training as trackers name it.

    Args:
        name: Name of its run; that of a resumed training is the same.
        project: Name of the group of runs.
        params: What it was trained with.
        folder: Folder for the files of TensorBoard and W&B, the same for all trainings.
        state: Folder of the training's checkpoints.
    """

    name: str
    project: str
    params: Mapping[str, Any]
    folder: Path
    state: Path


class Tracker(Protocol):
    """An open run of one tracker."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write figures of a step."""

    def close(self) -> None:
        """Write what is left, and end the run."""


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard" / run.name))
        self._writer.add_text("params", f"```\n{json.dumps(run.params, indent=2, default=str)}\n```")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and wandb.api.api_key is None:
            raise ValueError(
                "train.report_to: wandb has no key on this machine: set WANDB_API_KEY, type `wandb login`, or set "
                "WANDB_MODE=offline to write files that `wandb sync` uploads later"
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        # its copy of the output would contain secrets that the stages hide
        settings = wandb.Settings(console="off", silent=True, disable_code=True)
        options = {"dir": str(run.folder), "config": dict(run.params), "settings": settings}
        self._run = wandb.init(project=run.project, name=run.name, id=run.name, resume="allow", **options)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        options = {"config": dict(run.params), "embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        self._run = trackio.init(project=run.project, name=run.name, resume="allow", **options)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def check_trackers(names: Iterable[str]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Raises:
        ValueError: One is missing.
    """
    for name in names:
        if name != MLFLOW and find_spec(name) is None:
            raise ValueError(
                f"train.report_to: the package {name} is not installed: pip install {INSTALL[name]}, or remove {name}"
            )


class Trackers:
    """All trackers of one training. One that fails costs a warning, and gets no more figures.

    Args:
        names: Values of `train.report_to`.
        run: The training.

    Raises:
        ValueError: W&B has no key.
    """

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        from stages.tracking.store import curve_metric  # imports MLflow, which checks of params need not load

        self._metric = curve_metric
        self._file = run.state / SENT
        stored = read_json(self._file) if self._file.exists() else {}
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            if name == MLFLOW:
                continue
            try:
                self._open[name] = KINDS[name](run)
            except ValueError:
                raise
            except Exception as error:  # a service may raise anything, and MLflow has the record
                _warn(name, error)
        self._sent: dict[str, dict[str, int]] = {name: dict(stored.get(name, {})) for name in self._open}

    def log(self, figures: Mapping[str, float], step: int, time_ms: int) -> None:
        """Write the figures of a step that a tracker does not have yet.

        Args:
            figures: Column of the curve -> value.
            step: Optimizer step.
            time_ms: Milliseconds since 1970; trackers take the time themselves.
        """
        figures = {self._metric(column): value for column, value in figures.items()}
        for name in list(self._open):
            sent = self._sent[name]
            new = {figure: value for figure, value in figures.items() if step > sent.get(figure, -1)}
            if new and self._attempt(name, partial(self._open[name].log, new, step)):
                sent.update(dict.fromkeys(new, step))
        if self._open:
            write_json(self._file, self._sent)

    def close(self) -> None:
        """End the runs of all trackers."""
        for name in list(self._open):
            self._attempt(name, self._open[name].close)
        self._open.clear()

    def _attempt(self, name: str, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:
            _warn(name, error)
            del self._open[name]
            return False
        return True


def _warn(name: str, error: Exception) -> None:
    reason = redact(" ".join(str(error).split()))[:300]
    print(f"warning: {name} gets no figures of this training, MLflow does: {reason}", file=sys.stderr, flush=True)
