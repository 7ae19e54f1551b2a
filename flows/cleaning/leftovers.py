"""Leftovers of runs: worktrees of runs that have ended, checkpoints that were not resumed, old logs.

A run in MLflow whose training can't be resumed without its checkpoints is ended when these are removed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.checkout import worktree
from stages.checkout.artifacts import read_json
from stages.checkout.paths import main_checkout
from stages.launch.lock import trainings_at_work
from stages.params.schema import load_params
from stages.tracking.live_run import KEY_FILE, KEY_TAG
from stages.tracking.store import PROGRESS_TAG, Tracking, open_tracking

DAY_S = 86400.0

FINISHED = "finished"
"""File that a training writes into its checkpoint folder after its results (stages/training/checkpoints.py)."""

FINISHED_AGE_S = 3600.0
"""Minimum age of the checkpoints of a finished training: DVC may still be caching and recording its results."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that is no longer needed.

    Args:
        path: Its path.
        why: Why it is not needed.
        num_bytes: Its size.
    """

    path: Path
    why: str
    num_bytes: int


def find_leftovers(root: Path, keep_days: float) -> list[Leftover]:
    """Find the leftovers of a checkout.

    Args:
        root: The checkout.
        keep_days: Days for which checkpoints of unfinished trainings and logs are kept.
    """
    # the checkpoints of a running training may be older than a small keep_days
    training = any(folder.is_relative_to(root) for folder in trainings_at_work())
    found = [(path, "its run has ended") for path in worktree.abandoned(root)]
    state = root / ".state"
    for folder in sorted((state / "train").glob("*/")):
        age = time.time() - newest(folder)
        if (folder / FINISHED).exists() and age > FINISHED_AGE_S:
            found.append((folder, "checkpoints of a training that has finished"))
        elif age > keep_days * DAY_S and not training:
            found.append((folder, f"checkpoints that were not resumed for {age / DAY_S:.0f} days"))
    for log in sorted((state / "logs").glob("*.log")):
        age = time.time() - log.stat().st_mtime
        if age > keep_days * DAY_S:
            found.append((log, f"a log from {age / DAY_S:.0f} days ago"))
    return [Leftover(path, why, size(path)) for path, why in found]


def remove_leftovers(root: Path, leftovers: list[Leftover]) -> None:
    """Remove leftovers; worktrees are removed from git's list, too."""
    worktree.prune(root)
    for leftover in leftovers:
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path, ignore_errors=True)
        else:
            leftover.path.unlink(missing_ok=True)


def newest(folder: Path) -> float:
    """Return when a folder, or anything in it, was last modified, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def size(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class UnfinishedRun:
    """A run in MLflow, unfinished, whose training can't be resumed.

    Args:
        run_id: Its id.
        name: Its name.
        why: Why its checkpoints are removed.
    """

    run_id: str
    name: str
    why: str


def find_unfinished_runs(root: Path, leftovers: Iterable[Leftover]) -> tuple[Tracking | None, list[UnfinishedRun]]:
    """Find the runs that were begun by unfinished trainings whose checkpoints are among the leftovers.

    Args:
        root: The checkout.
        leftovers: What is going to be removed.

    Returns:
        The store and the runs; None and an empty list if no such training has begun a run.

    Raises:
        ValueError: The tracking store can't be used, or a key file is damaged.
    """
    begun = [one for one in leftovers if (one.path / KEY_FILE).exists() and not (one.path / FINISHED).exists()]
    if not begun:
        return None, []
    tracking = open_tracking(load_params(root / "params.yaml").publish, main_checkout(root))
    found = []
    for one in begun:
        for run_id in tracking.find_unfinished(KEY_TAG, str(read_json(one.path / KEY_FILE)["key"])):
            run = tracking.client.get_run(run_id)
            # KILLED: the next run of anything has found that its process had ended
            if run.info.status in ("RUNNING", "KILLED") and run.data.tags.get(PROGRESS_TAG) == "training":
                found.append(UnfinishedRun(run_id, run.info.run_name, one.why))
    return tracking, found


def end_unfinished_runs(tracking: Tracking, runs: Iterable[UnfinishedRun]) -> None:
    """Set the status of runs to KILLED, and write the reason into their progress tag."""
    for run in runs:
        tracking.client.set_tag(run.run_id, PROGRESS_TAG, f"given up, its checkpoints were removed: {run.why}")
        tracking.client.set_terminated(run.run_id, "KILLED")
