"""Tokens a second over the steps of a training: wall times, so they stand beside the outs and not in them."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stages.checkout.artifacts import write_text

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
