"""A training under Ray Train: the same result as under `accelerate launch`; all workers end, with one error message."""

from __future__ import annotations

import importlib.util
import io
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from datasets import Dataset

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.launch.ray import WorkerLines, check_resources, launch_with_ray
from stages.launch.stopping import EXIT_SAVED
from stages.params.schema import LaunchSection, ParamsError, load_params
from tests.stages.training_root import (
    ENDLESS,
    NUM_ROWS,
    launch_section,
    make_training_root,
    packed_row,
    run_stage,
    set_params,
    start_stage,
)

RAY = {"launcher": "ray", "processes": 2}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")


def section(**values: Any) -> LaunchSection:
    return launch_section(**{**RAY, **values})


def errors_said(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def start_training(paths: Paths, locks: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A stage that trains by now, and everything that it started."""
    stage = start_stage(paths, SFT_LOCK_DIR=str(locks))
    assert stage.stdout is not None
    said = []
    for line in stage.stdout:
        said.append(line)
        if line.startswith("train: 2 of "):
            return stage, psutil.Process(stage.pid).children(recursive=True)
    raise AssertionError("".join(said))


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ray_train_and_accelerate_launch_write_the_same(tmp_path: Path, engine: str) -> None:
    roots = []
    for launcher in ("accelerate", "ray"):
        launch = {"processes": 2, "launcher": launcher, "engine": engine}
        roots.append(make_training_root(tmp_path / launcher, per_device_train_batch_size=2, launch=launch))
        output = run_stage(roots[-1], SFT_LOCK_DIR=str(tmp_path / "locks"))
        assert output.count("\ntrain: 8 of 8 steps (100 %), loss") == 2, output
    assert "workers of Ray Train" in output
    for name in ("model/adapter_model.safetensors", "curve.csv"):
        assert len({paths.out("train", name).read_bytes() for paths in roots}) == 1, name
    assert read_json(roots[0].metrics("train")) == read_json(roots[1].metrics("train"))


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_fails_ends_the_others_and_its_error_is_the_one_message(tmp_path: Path) -> None:
    paths = make_training_root(tmp_path, per_device_train_batch_size=2, launch=RAY, **ENDLESS)
    rows = [packed_row(number) for number in range(NUM_ROWS)]
    rows[7]["seq_lengths"] = [1, 2]
    shutil.rmtree(paths.out("pack", "train"))
    Dataset.from_list(rows).save_to_disk(str(paths.out("pack", "train")))
    output = run_stage(paths, code=1, SFT_LOCK_DIR=str(tmp_path / "locks"))
    (message,) = errors_said(output)
    assert message.startswith("error: process ")
    assert "'seq_lengths' of row" in message
    assert "Traceback" not in output


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_stage_ends_ray_and_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    paths = make_training_root(tmp_path, per_device_train_batch_size=2, launch=RAY, **ENDLESS)
    stage, processes = start_training(paths, tmp_path / "locks")
    assert len(processes) > 3
    stage.send_signal(number)
    stage.communicate(timeout=120)
    assert stage.returncode == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_SAVED)
    _, alive = psutil.wait_procs(processes, timeout=150)  # Ray's agents look for their parent now and then
    assert alive == []


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_ends_the_others_and_is_named(tmp_path: Path) -> None:
    paths = make_training_root(tmp_path, per_device_train_batch_size=2, launch=RAY, **ENDLESS)
    stage, processes = start_training(paths, tmp_path / "locks")
    worker = next(process for process in processes if "RayTrainWorker" in " ".join(process.cmdline()))
    worker.kill()
    started = time.monotonic()
    output, _ = stage.communicate(timeout=120)
    assert time.monotonic() - started < 100
    assert stage.returncode == 137  # flows try again
    (message,) = errors_said(output)
    assert "was ended by signal 9 (out of memory?)" in message


def test_without_the_package_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package ray, which is not installed; `pip install '\.\[ray\]'`"):
        launch_with_ray("train", section(), Paths(tmp_path), {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"machines": 2}, "Ray places the processes itself"),
        ({"port": 29500}, "Ray places the processes itself"),
        ({"engine": "deepspeed_zero3"}, "with launcher ray, use fsdp2, which also divides the model"),
    ],
)
def test_what_ray_would_ignore_is_refused_with_params(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    set_params(tmp_path, launch={**RAY, **values})
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")


def test_more_workers_than_devices_are_refused() -> None:
    check_resources(section(processes=4), {"GPU": 4.0, "CPU": 1.0}, "this machine")
    with pytest.raises(ValueError, match="Ray on head:6379 has 4 GPUs"):
        check_resources(section(processes=8), {"GPU": 4.0, "CPU": 64.0}, "head:6379")


def test_lines_of_workers_are_printed_as_they_were() -> None:
    stream = io.StringIO()
    lines = WorkerLines(stream, only_workers=True)
    for line in (
        "(RayTrainWorker pid=7) train: 1 of 8 steps",
        "(TrainController pid=3) Requesting resources",
        "(RayTrainWorker pid=7, ip=10.0.0.2) train: 2 of 8 steps",
    ):
        print(line, file=lines)
    assert stream.getvalue() == "train: 1 of 8 steps\ntrain: 2 of 8 steps\n"
