"""A throw-away checkout as a recorded run found it: its commit, its uncommitted changes, its params, its data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.entities import Run

from stages.tracking.store import Tracking

FOLDER = ".worktrees"
PATCH, LOCK = "uncommitted.patch", "dvc.lock"


@dataclass(frozen=True)
class Record:
    """The files that a run keeps of its lineage.

    Args:
        folder: Where copies of them lie.
        commit: The commit that was checked out.
        dirty: Whether files differed from it.
    """

    folder: Path
    commit: str
    dirty: bool

    @property
    def patch(self) -> Path | None:
        """The uncommitted changes; None when there were none."""
        path = self.folder / PATCH
        return path if self.dirty and path.exists() and path.stat().st_size else None


@contextmanager
def fetched_record(tracking: Tracking, run: Run) -> Iterator[Record]:
    """The record of a run, copied out of MLflow for the time of the block.

    Raises:
        ValueError: The run does not hold what is needed to repeat it.
    """
    run_id = run.info.run_id
    commit = run.data.tags.get("git.commit", "none")
    names = {Path(item.path).name for item in tracking.client.list_artifacts(run_id, "lineage")}
    missing = [name for name in ("params.yaml", LOCK) if name not in names]
    if commit == "none" or missing:
        what = ", ".join([*missing, *(["a git commit"] if commit == "none" else [])])
        raise ValueError(f"run {run_id[:12]} ({run.info.run_name}) can't be repeated: it was recorded without {what}")
    with tempfile.TemporaryDirectory() as folder:
        tracking.client.download_artifacts(run_id, "lineage", folder)
        yield Record(Path(folder) / "lineage", commit, run.data.tags.get("git.dirty") == "true")


@contextmanager
def recorded_checkout(home: Path, record: Record, name: str, keep: bool) -> Iterator[Path]:
    """A git worktree in the state that a record tells, gone behind the block unless it is to be kept.

    It has a DVC cache of its own, so that nothing is taken from the cache that is to be computed, and no dvc.lock.

    Args:
        home: The main checkout.
        record: What the state was.
        name: Name of the worktree.
        keep: Leave it there.

    Raises:
        ValueError: The commit is not in this repository, the patch does not fit it, data can't be brought back, or the
            same run is being repeated already.
    """
    path = home / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    # the protocol of flows/runs/worktree.py: whoever is gone holds no lock, and what it left is removed by the next run
    lock = FileLock(path.with_name(f"{name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{path}: another process repeats this run just now") from None
    try:
        _remove(home, path)
        _create(home, path, record)
        yield path
    finally:
        if not keep:
            _remove(home, path)
        lock.release()
        path.with_name(f"{name}.lock").unlink(missing_ok=True)


def _create(home: Path, path: Path, record: Record) -> None:
    if _call(["git", "cat-file", "-e", f"{record.commit}^{{commit}}"], home):
        raise ValueError(f"commit {record.commit} is not in this repository; fetch it: git fetch --all")
    _expect(["git", "worktree", "add", "--detach", "--quiet", str(path), record.commit], home)
    if record.patch is not None:
        _expect(["git", "apply", "--whitespace=nowarn", str(record.patch)], path)
    shutil.copyfile(record.folder / "params.yaml", path / "params.yaml")
    _bring_data(home, path)
    (path / LOCK).unlink(missing_ok=True)


def _bring_data(home: Path, path: Path) -> None:
    """Data that DVC keeps instead of git: from the cache of the checkout, else from the remote."""
    local = path / ".dvc" / "config.local"
    cache = subprocess.run(dvc("cache", "dir"), cwd=home, capture_output=True, text=True, check=False).stdout.strip()
    listed = subprocess.run(["git", "ls-files", "*.dvc"], cwd=path, capture_output=True, text=True, check=False).stdout
    # a remote that only this checkout's own settings name is used as well
    own = home / ".dvc" / "config.local"
    settings = own.read_text(encoding="utf-8") if own.exists() else ""
    local.write_text(settings, encoding="utf-8")
    if listed.split():
        _expect(dvc("cache", "dir", "--local", cache), path)
        if _call(dvc("checkout", "--quiet", *listed.split()), path):
            _expect(dvc("pull", "--quiet", *listed.split()), path)
    _expect(dvc("cache", "dir", "--local", str(path / ".dvc" / "cache")), path)


def dvc(*arguments: str) -> list[str]:
    """A command of this interpreter's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def stage_environment(path: Path) -> dict[str, str]:
    """For the stages of a checkout: its own checkpoints, no run of its own in MLflow, this interpreter's tools."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": search, "SFT_STATE_DIR": str(path / ".state"), "SFT_LIVE_RUN": "off"}


def _remove(home: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _call(["git", "worktree", "prune"], home)


def _call(command: list[str], cwd: Path) -> str:
    """What a command said when it failed; empty when it did not."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    said = " ".join((done.stderr or done.stdout).split())
    return "" if done.returncode == 0 else said or f"exit code {done.returncode}"


def _expect(command: list[str], cwd: Path) -> None:
    problem = _call(command, cwd)
    if problem:
        shown = " ".join(command[2:] if command[1] == "-m" else command)
        raise ValueError(f"{shown}: {problem}")
