"""Out of memory: training continues with the same updates in smaller forward passes, if allowed and possible."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft.train.trainer import SFTTrainer
from stages.__main__ import main
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.launch.processes import ProcessKilled, failure_of
from stages.params.schema import TrainSection, load_params
from stages.training.checkpoints import TrainingState
from stages.training.out_of_memory import OutOfMemory, fewer_rows, make_smaller, section_that_fits
from tests.stages.launch.test_processes import failure
from tests.stages.training_root import REPO, make_training_root, run_stage, train_here

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."
# What a launched process loads before all else.
SITE = """
import os
if "LOCAL_RANK" in os.environ:
    import torch
    from sft.train.trainer import SFTTrainer
    step = SFTTrainer.training_step
    def limited(self, *args, **kwargs):
        if self.state.global_step == 5 and self.args.per_device_train_batch_size > 1 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *args, **kwargs)
    SFTTrainer.training_step = limited
"""


def limit_rows(monkeypatch: pytest.MonkeyPatch, fits: int, from_step: int) -> None:
    """A device on which steps with more rows per forward pass than fit end as on a real one."""
    step = SFTTrainer.training_step

    def limited(self: SFTTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= from_step and self.args.per_device_train_batch_size > fits:
            raise torch.OutOfMemoryError(SAID)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", limited)


def losses(paths: Paths) -> list[float]:
    with paths.out("train", "curve.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_training_ends_as_if_memory_had_sufficed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, small = (make_training_root(tmp_path / name) for name in ("whole", "small"))
    train_here(whole)
    capsys.readouterr()
    limit_rows(monkeypatch, fits=1, from_step=5)
    train_here(small)

    said = capsys.readouterr().out
    assert (
        "out of memory in step 6 with 4 rows per forward pass; continuing from the last checkpoint with 2 rows" in said
    )
    assert (
        "out of memory in step 6 with 2 rows per forward pass; continuing from the last checkpoint with 1 row " in said
    )
    assert said.count("resuming from checkpoint-4") == 2
    expected = read_json(whole.metrics("train"))
    assert expected["out_of_memory"] == 0
    found = read_json(small.metrics("train"))
    assert (found.pop("out_of_memory"), found.pop("rows_a_pass")) == (2, 1)
    assert found.pop("epochs") == pytest.approx(expected["epochs"], abs=0.1)  # upstream counts passes, not rows
    assert found == pytest.approx({name: value for name, value in expected.items() if name in found}, abs=1e-5)
    assert losses(small) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(small)[:4] == losses(whole)[:4]
    weights, others = (load_file(paths.out("train", "model", "adapter_model.safetensors")) for paths in (whole, small))
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-5


def section(**values: Any) -> TrainSection:
    shipped = load_params(REPO / "params.yaml").train.model_dump()
    return TrainSection.model_validate(shipped | values)


@pytest.mark.parametrize(
    ("values", "way_out"),
    [
        ({"per_device_train_batch_size": 8, "on_oom": "fail"}, r"with 8 rows; set train\.on_oom: halve"),
        ({"per_device_train_batch_size": 1}, r"fewer than one row: set train\.gradient_checkpointing: true"),
    ],
)
def test_where_parts_may_not_or_can_not_be_smaller_the_ways_out_are_named(
    tmp_path: Path, values: dict[str, Any], way_out: str
) -> None:
    with pytest.raises(ValueError, match=way_out):
        make_smaller(section(**values), TrainingState(tmp_path), "out of memory with 8 rows")


def test_a_model_that_never_fits_is_one_message_and_no_attempt_with_fewer_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_training_root(tmp_path, lora_r=99_999_999_999)
    assert main(["train", "--root", str(paths.root)]) == 1
    printed = capsys.readouterr()
    output = printed.out + printed.err
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "out of memory before the first step" in said
    assert "a smaller train.lora_r" in said
    assert "Traceback" not in output


def test_update_keeps_its_rows(tmp_path: Path) -> None:
    asked = section(per_device_train_batch_size=12, gradient_accumulation_steps=2, on_oom="halve")
    rows = []
    for _ in range(3):
        make_smaller(asked, TrainingState(tmp_path), "out of memory")
        now = section_that_fits(asked, TrainingState(tmp_path))
        rows.append((now.per_device_train_batch_size, now.gradient_accumulation_steps))
    assert rows == [(6, 4), (3, 8), (1, 24)]
    assert [fewer_rows(rows) for rows in (2, 3, 5, 9, 10)] == [1, 1, 1, 3, 5]
    # a user who asks for less than was chosen after an out-of-memory error gets what is asked for
    one_row = section(per_device_train_batch_size=1)
    assert section_that_fits(one_row, TrainingState(tmp_path)).per_device_train_batch_size == 1


def test_failure_of_a_process_tells_whether_another_attempt_may_succeed() -> None:
    lost = failure("RuntimeError: gloo: Connection closed by peer", timestamp=1)
    out_of_memory = failure_of({0: lost, 1: failure("OutOfMemory: out of memory in step 6", timestamp=2)}, 2)
    assert type(out_of_memory) is OutOfMemory
    assert str(out_of_memory) == "process 1 of 2: out of memory in step 6"
    killed = failure_of({0: lost, 1: failure(exitcode=-9, timestamp=2)}, 2)
    assert isinstance(killed, ProcessKilled)
    assert killed.exit_code == 137
    assert type(failure_of({0: lost, 1: failure("ValueError: bad row", timestamp=2)}, 2)) is ValueError


@pytest.mark.slow
def test_one_of_two_processes_that_runs_out_of_memory_makes_both_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    one = make_training_root(tmp_path / "one")
    run_stage(one)
    two = make_training_root(tmp_path / "two", per_device_train_batch_size=2, launch={"processes": 2})

    output = run_stage(two, PYTHONPATH=f"{tmp_path}:{REPO}")

    assert (
        "out of memory in step 6 with 2 rows per forward pass; continuing from the last checkpoint with 1 row "
        in output
    )
    assert "resuming from checkpoint-4" in output
    assert read_json(two.metrics("train"))["out_of_memory"] == 1
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
