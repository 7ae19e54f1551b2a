"""Tokens a second: measured between points of the curve, and gone on with after an interruption."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from stages.training.curve import Throughput, read_points


def run_steps(throughput: Throughput, first: int, last: int) -> None:
    """What the trainer calls, a hundred tokens a step and a point every second step."""
    state = SimpleNamespace(global_step=first, num_input_tokens_seen=100 * first, is_world_process_zero=True)
    throughput.on_train_begin(None, state, None)
    for step in range(first + 1, last + 1):
        throughput.on_step_begin(None, state, None)
        state.global_step, state.num_input_tokens_seen = step, 100 * step
        throughput.on_step_end(None, state, None)
        if step % 2 == 0:
            throughput.on_log(None, state, None, {"loss": 1.0})
            throughput.on_log(None, state, None, {"eval_loss": 1.0})


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
