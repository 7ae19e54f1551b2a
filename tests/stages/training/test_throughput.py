"""Tokens per second: measured between points of the curve, continued after a resume, the same in file and MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from stages.progress import stage_progress
from stages.training.curve import LiveCurve, Throughput, TrainingProgress, read_points

CONTROL = SimpleNamespace(should_log=False)
"""Control of a trainer whose other callbacks asked for nothing."""


def run_steps(throughput: Throughput, first: int, last: int, *others: TrainerCallback) -> None:
    """Call what the trainer calls, with a hundred tokens per step and a point every second step."""
    state = SimpleNamespace(global_step=first, max_steps=last, log_history=[], is_world_process_zero=True)
    state.num_input_tokens_seen = 100 * first
    callbacks = [throughput, *others]
    for callback in callbacks:
        callback.on_train_begin(None, state, None)
    for step in range(first + 1, last + 1):
        for callback in callbacks:
            callback.on_step_begin(None, state, CONTROL)
        state.global_step, state.num_input_tokens_seen = step, 100 * step
        for callback in callbacks:
            callback.on_step_end(None, state, CONTROL)
        for logs in ({"loss": 1.0}, {"eval_loss": 1.0}) if step % 2 == 0 else ():
            for callback in callbacks:
                callback.on_log(None, state, None, logs)


def test_a_point_is_tokens_over_the_time_of_its_steps(tmp_path: Path) -> None:
    throughput = Throughput(tmp_path / "throughput.csv")
    run_steps(throughput, 0, 6)
    assert [step for step, _ in throughput.points] == [2, 4, 6]
    assert all(speed > 1000 for _, speed in throughput.points)
    assert read_points((tmp_path / "throughput.csv").read_text()) == [(s, round(v, 1)) for s, v in throughput.points]


def test_a_resumed_training_goes_on_with_the_points_up_to_its_checkpoint(tmp_path: Path) -> None:
    run_steps(Throughput(tmp_path / "throughput.csv"), 0, 6)
    resumed = Throughput(tmp_path / "throughput.csv")
    run_steps(resumed, 4, 8)
    assert [step for step, _ in resumed.points] == [2, 4, 6, 8]


class Sent:
    """A run that keeps what it is sent."""

    def __init__(self) -> None:
        self.figures: list[tuple[int, dict[str, float]]] = []

    def log(self, figures: Mapping[str, float], step: int, time_ms: int) -> None:
        self.figures.append((step, dict(figures)))


def test_file_and_mlflow_are_given_the_same_points(tmp_path: Path) -> None:
    throughput, sent = Throughput(tmp_path / "throughput.csv"), Sent()
    run_steps(throughput, 0, 4, LiveCurve(sent, throughput))
    (first, second) = throughput.points
    assert sent.figures == [
        (2, {"loss": 1.0, "tokens_per_second": first[1]}),
        (2, {"eval_loss": 1.0}),
        (4, {"loss": 1.0, "tokens_per_second": second[1]}),
        (4, {"eval_loss": 1.0}),
    ]


def test_a_progress_line_has_figures_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    throughput = Throughput(tmp_path / "throughput.csv")
    with stage_progress("train"):
        run_steps(throughput, 2, 6, TrainingProgress(throughput))
    lines = [
        re.sub(r"[\d.,]+ tokens/s, [\d.]+ GB", "N tokens/s, N GB", line)
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [re.sub(r"[\d.,]+/s, \d+ s left", "N/s, N s left", line) for line in lines] == [
        "train: 2 of 6 steps (33 %), resumed",
        "train: 4 of 6 steps (66 %), N/s, N s left, loss 1.0000, N tokens/s, N GB",
        "train: 4 of 6 steps (66 %), N/s, N s left, loss 1.0000, eval loss 1.0000, N tokens/s, N GB",
        "train: 6 of 6 steps (100 %), loss 1.0000, eval loss 1.0000, N tokens/s, N GB",
        "train: 6 of 6 steps (100 %), loss 1.0000, eval loss 1.0000, N tokens/s, N GB",
        "train: 6 of 6 steps (100 %), loss 1.0000, eval loss 1.0000, N tokens/s, N GB",
    ]
