"""SIGTERM amid a training: a checkpoint is saved, the exit code says so, and the resumed training has the same bits."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.checkout.paths import Paths
from stages.launch.stopping import EXIT_SAVED, STOP_FILE_VARIABLE, delaying_sigterm, grace_s, patience_s
from tests.stages.training_root import REPO, make_training_root, run_stage, start_stage, train_here

STEPS = 60
OUTS = ("model/adapter_model.safetensors", "curve.csv")
LONG = {"max_steps": STEPS, "save_steps": 1000, "eval_steps": 25, "lora_dropout": 0.1, "logging_steps": 7}


def interrupted(paths: Paths, number: int = signal.SIGTERM, **variables: str) -> str:
    """Start the stage, send it a signal after its first log line, and return what it printed."""
    stage = start_stage(paths, SFT_LIVE_RUN="off", **variables)
    assert stage.stdout is not None
    printed = []
    for line in stage.stdout:
        printed.append(line)
        if line.startswith("train: 7 of "):
            stage.send_signal(number)
            break
    rest, _ = stage.communicate(timeout=120)
    output = "".join([*printed, rest])
    assert stage.returncode == EXIT_SAVED, output
    return output


def outs(paths: Paths) -> list[bytes]:
    return [paths.out("train", name).read_bytes() for name in OUTS]


def test_a_training_ended_by_sigterm_goes_on_from_there_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_LIVE_RUN", "off")
    paths, whole = (make_training_root(tmp_path / name, **LONG) for name in ("stopped", "whole"))
    output = interrupted(paths, SFT_LOCK_DIR=str(tmp_path / "locks"))
    (checkpoint,) = paths.state.glob("train/*/checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 7 <= step < STEPS
    assert f"stopped: SIGTERM stopped the training, which has saved {checkpoint.name}" in output
    assert not paths.out("train", "model").exists()
    train_here(paths)
    assert not list(paths.state.glob("train/*/stopped.json"))
    train_here(whole)
    assert outs(paths) == outs(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["accelerate", "ray"])
def test_launchers_pass_sigterm_on_to_all_processes(tmp_path: Path, launcher: str) -> None:
    if launcher == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    launch: dict[str, Any] = {"processes": 2, "launcher": launcher}
    values = {**LONG, "max_steps": 300, "per_device_train_batch_size": 2, "launch": launch}
    paths = make_training_root(tmp_path / "root", **values)
    locks = {"SFT_LOCK_DIR": str(tmp_path / "locks")}
    output = interrupted(paths, **locks)
    (checkpoint,) = paths.state.glob("train/*/checkpoint-*")
    assert f"which has saved {checkpoint.name}. Type the command again" in output
    assert "error:" not in output
    output = run_stage(paths, SFT_LIVE_RUN="off", **locks)
    assert f"resuming from {checkpoint.name}" in output


PATIENT = """
import sys, time
from stages.launch.stopping import delaying_sigterm, heed_signals, stoppable

def work():
    with delaying_sigterm(0.4) as is_asked:
        print("works", flush=True)
        while not is_asked():
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(60)
    return 0

heed_signals()
sys.exit(stoppable(work))
"""


def test_a_step_that_takes_longer_than_the_grace_is_not_waited_for() -> None:
    command = [sys.executable, "-c", PATIENT]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)  # the supervisor and the launcher both send one
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - started >= 0.2


def test_a_file_takes_the_place_of_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(tmp_path / "stop"))
    with delaying_sigterm(20.0) as is_asked:
        assert not is_asked()
        (tmp_path / "stop").touch()
        assert is_asked()


def test_grace_is_a_number_of_seconds() -> None:
    assert grace_s({}) == 20.0
    assert (patience_s(20.0), patience_s(4.0), patience_s(120.0)) == (15.0, 2.0, 115.0)
    assert grace_s({"SFT_GRACE_S": "110.5"}) == 110.5
    for text in ("soon", "0", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match=f"SFT_GRACE_S='{text}': it must be a number of seconds above 0"):
            grace_s({"SFT_GRACE_S": text})
