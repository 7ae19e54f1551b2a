"""The curve of a training in MLflow as it grows: loss, held-out loss, rate, norm of the gradient, tokens a second.

Tokens a second over the steps of a training: wall times, so they stand beside the outs and not in them.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from stages.checkout.artifacts import write_text
from stages.checkout.paths import Paths
from stages.params.schema import Params
from stages.tracking import lineage
from stages.tracking.lineage import machine_tags
from stages.training.checkpoints import TrainingState, what_counts
from stages.training.out_of_memory import history

if TYPE_CHECKING:
    from stages.tracking.live_run import LiveRun

COLUMNS = ("step", "tokens_per_second")


class Throughput(TrainerCallback):
    """Measures between points of the curve; evaluations and checkpoints are not counted in.

    Args:
        file: Where the points lie while the training is unfinished, so that a resumed one goes on with them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.points: list[tuple[int, float]] = []
        self._seconds, self._tokens, self._started = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the points of the steps that are done."""
        points = read_points(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        self.points = [point for point in points if point[0] <= state.global_step]
        self._seconds, self._tokens, self._started = 0.0, state.num_input_tokens_seen, time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self._seconds += time.monotonic() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Set a point."""
        tokens = state.num_input_tokens_seen - self._tokens
        if not logs or "loss" not in logs or not self._seconds or not tokens:
            return
        self.points.append((state.global_step, tokens / self._seconds))
        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        if state.is_world_process_zero:
            write_text(self._file, self.as_csv())

    def as_csv(self) -> str:
        """All points."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([COLUMNS, *((step, round(speed, 1)) for step, speed in self.points)])
        return text.getvalue()


def read_points(text: str) -> list[tuple[int, float]]:
    """Points of a file that `Throughput` wrote."""
    return [(int(row[COLUMNS[0]]), float(row[COLUMNS[1]])) for row in csv.DictReader(io.StringIO(text))]


MEMORY_TAG = "sft.out_of_memory"

SWITCH, ON, OFF = "SFT_LIVE_RUN", "on", "off"


@contextmanager
def live_run(params: Params, paths: Paths, state: TrainingState, first_process: bool) -> Iterator[LiveRun | None]:
    """The run of this training, or None where another process has it or the environment says SFT_LIVE_RUN=off.

    Raises:
        ValueError: SFT_LIVE_RUN has another value.
    """
    switch = os.environ.get(SWITCH, ON)
    if switch not in (ON, OFF):
        raise ValueError(f"{SWITCH}={switch!r}: it is `{ON}` or `{OFF}`")
    if switch == OFF or not first_process:
        yield None
        return
    run = start(params, paths, state)
    try:
        yield run
    except Exception:
        run.ended("FAILED")
        raise
    except BaseException:
        run.ended("KILLED")
        raise
    run.trained(lineage.training_digest(params, paths))


def start(params: Params, paths: Paths, state: TrainingState) -> LiveRun:
    """Begin to record, or go on."""
    # here rather than above: launched processes that record nothing need not load MLflow
    from stages.tracking.live_run import LiveRun
    from stages.tracking.store import open_tracking

    home = lineage.main_checkout(paths.root)
    fixed = {"model": params.model.model_dump(), "train": what_counts(params.train)}
    stated = lineage.result_params(params)
    tags = {
        "mlflow.source.name": "python -m stages train",
        **lineage.circumstances(paths),
        **machine_tags(),
    }
    if told := history(state):
        tags[MEMORY_TAG] = told
    return LiveRun(
        lambda: open_tracking(params.publish, home),
        state.folder,
        f"{lineage.model_name(paths)}-unfinished",
        {name: value for name, value in lineage.flatten(fixed).items() if name in stated},
        tags,
    )


class LiveCurve(TrainerCallback):
    """Hands the figures of each log line to the run, with the speed since the line before."""

    def __init__(self, run: LiveRun, columns: tuple[str, ...]) -> None:
        self._run, self._columns = run, columns
        self._seconds, self._step_began, self._tokens = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fill what the run lacks of the steps before the checkpoint that the training goes on from."""
        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        for entry in state.log_history:
            self._hand_over(entry, entry["step"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock: evaluations and checkpoints are no training time."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self._seconds += time.monotonic() - self._step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Hand over what has just been logged."""
        if not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        figures = dict(logs)
        if "loss" in logs and self._seconds > 0:
            tokens, self._tokens = state.num_input_tokens_seen - self._tokens, state.num_input_tokens_seen
            figures["tokens_per_second"], self._seconds = tokens / self._seconds, 0.0
        self._hand_over(figures, state.global_step)

    def _hand_over(self, entry: dict[str, Any], step: int) -> None:
        names = (*self._columns, "tokens_per_second")
        figures = {name: float(entry[name]) for name in names if name != "step" and name in entry}
        self._run.log(figures, step, int(time.time() * 1000))
