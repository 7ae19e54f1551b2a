"""Two trainings on one device: the second names the first, and waits or is refused; a kill frees the device."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import stages.train
from stages.__main__ import main
from stages.checkout.paths import Paths
from stages.launch.lock import (
    BUSY_VARIABLE,
    FOLDER_VARIABLE,
    REFUSE,
    WAIT,
    describe_holder,
    devices_used,
    lock_folder,
    make_lock_folder,
    read_holder,
    sole_training,
)
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


AS_USER = """
import os, sys
from pathlib import Path
import torch
from stages.launch.lock import sole_training
os.umask(0o077)
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
try:
    with sole_training(Path(sys.argv[1])):
        print("training", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""
ADA, BOB = 54321, 54322


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user can reach, unlike `tmp_path`; the locks lie in it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        monkeypatch.setenv(FOLDER_VARIABLE, str(Path(folder) / "locks"))
        yield Path(folder)


def start_as(user: int, *, when_busy: str = WAIT) -> subprocess.Popen[str]:
    """Start a training of another user, with a umask that hides what it makes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), BUSY_VARIABLE: when_busy}
    command = [sys.executable, "-c", AS_USER, f"/home/{user}", str(user)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd="/", env=environment, stdin=pipe, stdout=pipe, text=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of two users")


@needs_root
def test_two_users_exclude_each_other_and_a_killed_one_hinders_no_one(shared: Path) -> None:
    ada = start_as(ADA)
    assert first_line(ada) == "training"
    refused = start_as(BOB, when_busy=REFUSE)
    by_ada = f"another training uses the processor of this machine: process {ada.pid} in /home/{ADA}, since "
    assert first_line(refused).startswith(by_ada)
    bob = start_as(BOB)
    assert first_line(bob).startswith(f"waiting: {by_ada}")
    ada.kill()  # its files stay, and only its user could delete them
    ada.wait()
    assert first_line(bob) == "training"
    again = start_as(ADA, when_busy=REFUSE)
    assert first_line(again).startswith(f"another training uses the processor of this machine: process {bob.pid} in ")
    for process in (refused, bob, again):
        process.communicate("end\n")
    folder = lock_folder()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder)] == [0o1777, 0o1777]
    assert [(path.name, path.stat().st_uid) for path in folder.glob("*.lock")] == [("cpu.lock", ADA)]
    assert [path.stat().st_uid for path in folder.glob("*.holder.json")] == [ADA]
    last = start_as(ADA)
    assert first_line(last) == "training"
    last.communicate("end\n")
    assert list(folder.glob("*.holder.json")) == []


@needs_root
def test_a_forged_file_of_another_user_is_a_message(shared: Path) -> None:
    ada = start_as(ADA)
    assert first_line(ada) == "training"
    (real,) = lock_folder().glob("*.holder.json")
    real.unlink()
    forged = lock_folder() / "cpu.0.holder.json"
    forged.write_text(json.dumps({"pid": ada.pid, "folder": "/evil", "since": 1.0}))
    os.chown(forged, BOB, BOB)
    assert read_holder(forged) is None
    refused = start_as(0, when_busy=REFUSE)
    assert first_line(refused).startswith(
        "another training uses the processor of this machine; cpu.0.holder.json in "
        f"{lock_folder()} should name it, but names no process of its owner"
    )
    for process in (ada, refused):
        process.communicate("end\n")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"pid": "1", "folder": "/x", "since": 1}', '{"pid": -1, "folder": "/x", "since": 1}', "[" * 9000,
     '{"pid": 1, "folder": "/x", "since": 1e999}', '{"pid": 1e999, "folder": 3, "since": "x"}', "x" * 20_000,
     '{"pid": 99999999999999999999, "folder": "/x", "since": 1}'],
)  # fmt: skip
def test_a_damaged_file_names_no_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "cpu.1.holder.json").write_text(content)
    assert read_holder(tmp_path / "cpu.1.holder.json") is None
    assert describe_holder("cpu", tmp_path) == "another training uses the processor of this machine; it has just begun"


def test_pipes_and_links_in_place_of_a_holder_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cpu.1.holder.json")
    (tmp_path / "real").write_text(json.dumps({"pid": os.getpid(), "folder": "/x", "since": 1.0}))
    (tmp_path / "cpu.2.holder.json").symlink_to(tmp_path / "real")
    assert [read_holder(file) for file in sorted(tmp_path.glob("*.json"))] == [None, None]
    assert read_holder(tmp_path / "real") == {"pid": os.getpid(), "folder": "/x", "since": 1.0}


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_no_file_is_written_through_what_lies_in_place_of_the_lock(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("content")
    folder = make_lock_folder()
    lock = folder / "cpu.lock"
    {
        "link": lambda: lock.symlink_to(victim),
        "dangling link": lambda: lock.symlink_to(tmp_path / "none"),
        "hard link": lambda: lock.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    refusal = r"cpu\.lock (can't be opened|is not a lock file).*; delete it$"
    with pytest.raises(ValueError, match=refusal), sole_training(tmp_path):
        pytest.fail("trained")
    assert victim.read_text() == "content"
    assert [path.name for path in folder.iterdir()] == ["cpu.lock"]
    assert not (tmp_path / "none").exists()


def test_a_folder_in_which_users_can_delete_the_locks_of_others_is_refused(tmp_path: Path) -> None:
    lock_folder().mkdir(parents=True)
    lock_folder().chmod(0o777)
    with pytest.raises(ValueError, match=r"every user can delete the locks of others; chmod 1777 "):
        make_lock_folder()
    lock_folder().rmdir()
    (tmp_path / "elsewhere").mkdir()
    lock_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is not a folder \(or a symbolic link to one\); delete it"):
        make_lock_folder()


def test_a_folder_that_can_not_be_made_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file" / "locks"))
    with pytest.raises(ValueError, match=r"SFT_LOCK_DIR: .* can't be used \(.*\); make a folder for all users"):
        make_lock_folder()


def test_the_folder_of_one_user_is_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    assert stat.S_IMODE(make_lock_folder().stat().st_mode) == 0o700
