"""Two trainings on one device: the second names the first, and waits or is refused; a kill frees the device."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stages.train
from stages.__main__ import main
from stages.checkout.paths import Paths
from stages.launch.lock import BUSY_VARIABLE, FOLDER_VARIABLE, REFUSE, devices_used, sole_training
from stages.launch.processes import LAUNCHED_VARIABLE
from stages.params.schema import load_params

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from pathlib import Path
from stages.launch.lock import sole_training
with sole_training(Path(sys.argv[1])):
    print("training", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv(BUSY_VARIABLE, raising=False)


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a process that locks the device until it reads a line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_second_training_is_refused_with_the_name_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path)
    try:
        assert first_line(first) == "training"
        monkeypatch.setenv(BUSY_VARIABLE, REFUSE)
        said = f"process {first.pid} in {re.escape(str(tmp_path))}, since 20.* \\(0 min\\)"
        with pytest.raises(ValueError, match=said), sole_training(Path("elsewhere")):
            pytest.fail("both trained")
    finally:
        first.kill()
        first.wait()


def test_second_training_waits_until_the_first_has_ended(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert first_line(first) == "training"
    second = start(tmp_path)

    assert first_line(second).startswith(
        f"waiting: another training uses the processor of this machine: process {first.pid}"
    )
    first.communicate("end\n")
    assert first_line(second) == "training"
    assert first.wait(timeout=5) == 0
    second.communicate("end\n")
    assert second.returncode == 0


def test_killed_training_frees_the_device_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path)
    assert first_line(first) == "training"
    first.send_signal(signal.SIGKILL)
    first.wait()

    monkeypatch.setenv(BUSY_VARIABLE, REFUSE)
    started = time.monotonic()
    with sole_training(tmp_path):
        assert time.monotonic() - started < 1


def test_stage_train_takes_the_lock_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.setenv(BUSY_VARIABLE, REFUSE)
    monkeypatch.setattr("stages.tools.check.check_later_stages", lambda params, paths: None)  # it reads earlier outs
    with sole_training(tmp_path):
        assert main(["train", "--root", str(tmp_path)]) == 1
        assert f"process {os.getpid()} in {tmp_path}" in capsys.readouterr().err
        assert main(["summary", "--root", str(tmp_path)]) == 1
        assert "the pipeline has not run here yet" in capsys.readouterr().err


def test_stage_train_checks_the_later_stages_before_it_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("evaluate would fail")

    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.setenv(BUSY_VARIABLE, REFUSE)
    monkeypatch.setattr("stages.tools.check.check_later_stages", refuse)
    with sole_training(tmp_path):
        assert main(["train", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: evaluate would fail\n"


def test_unknown_wish_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUSY_VARIABLE, "perhaps")
    with (
        pytest.raises(ValueError, match="SFT_WHEN_BUSY='perhaps': it must be `wait` or `refuse`"),
        sole_training(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("gpus", "ranks", "devices"),
    [
        ([], (None, None), ["cpu"]),
        ([], ("0", "2"), ["cpu"]),
        ([], ("1", "2"), []),
        (["a", "b", "c"], (None, None), ["gpu-a", "gpu-b", "gpu-c"]),
        (["a", "b", "c"], ("0", "2"), ["gpu-a", "gpu-b"]),
        (["a", "b", "c"], ("1", "2"), []),
        (["a"], ("0", "2"), ["gpu-a"]),
        (["a", "b"], ("0", None), ["gpu-a", "gpu-b"]),
    ],
)
def test_devices_that_a_process_locks(
    gpus: list[str], ranks: tuple[str | None, str | None], devices: list[str]
) -> None:
    assert devices_used(gpus, *ranks) == devices


def test_processes_of_the_users_own_launcher_take_the_lock_and_those_of_the_stage_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, paths = load_params(ROOT / "params.yaml"), Paths(tmp_path)
    for name, value in {BUSY_VARIABLE: REFUSE, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(LAUNCHED_VARIABLE, raising=False)
    trained: list[Path] = []
    monkeypatch.setattr(stages.train, "train", lambda params, paths: trained.append(paths.root))
    first = start(tmp_path)
    try:
        assert first_line(first) == "training"
        with pytest.raises(ValueError, match=f"process {first.pid} in {re.escape(str(tmp_path))}"):
            stages.train.run(params, paths)
        monkeypatch.setenv("LOCAL_RANK", "1")  # waits for the first process, which locks for all
        stages.train.run(params, paths)
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv(LAUNCHED_VARIABLE, "1")
        stages.train.run(params, paths)
        assert trained == [tmp_path] * 2
    finally:
        first.communicate("end\n")
