"""What runs leave behind: worktrees of the dead, checkpoints that nobody will resume, old logs.

Runs in MLflow whose training can't be resumed once its checkpoints are gone: they end together with these.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.checkout import worktree
from stages.checkout.artifacts import read_json
from stages.launch.lock import trainings_at_work
from stages.params.schema import load_params
from stages.tracking.lineage import main_checkout
from stages.tracking.live_run import KEY_FILE, KEY_TAG
from stages.tracking.store import PROGRESS_TAG, Tracking, open_tracking

DAY_S = 86400.0

FINISHED = "finished"
"""What a training puts into its folder of checkpoints when its results are written (stages/training/checkpoints.py)."""

FINISHED_AGE_S = 3600.0
"""DVC copies a finished stage's results for a while before it has recorded the stage."""


@dataclass(frozen=True)
class Leftover:
    """Something that can go.

    Args:
        path: Where it lies.
        why: Why nobody needs it.
        num_bytes: Its size.
    """

    path: Path
    why: str
    num_bytes: int


def find_leftovers(root: Path, keep_days: float) -> list[Leftover]:
    """Everything of a checkout that can go.

    Args:
        root: The checkout.
        keep_days: Days that an unfinished training may wait to be resumed, and a log to be read.
    """
    # whichever checkpoints it writes: few days may be fewer than it takes to the next one
    training = any(folder.is_relative_to(root) for folder in trainings_at_work())
    found = [(path, "its run is gone") for path in worktree.abandoned(root)]
    state = root / ".state"
    for folder in sorted((state / "train").glob("*/")):
        age = time.time() - newest(folder)
        if (folder / FINISHED).exists() and age > FINISHED_AGE_S:
            found.append((folder, "checkpoints of a training that has finished"))
        elif age > keep_days * DAY_S and not training:
            found.append((folder, f"checkpoints that nobody resumed for {age / DAY_S:.0f} days"))
    for log in sorted((state / "logs").glob("*.log")):
        age = time.time() - log.stat().st_mtime
        if age > keep_days * DAY_S:
            found.append((log, f"a log of {age / DAY_S:.0f} days ago"))
    return [Leftover(path, why, size(path)) for path, why in found]


def remove_leftovers(root: Path, leftovers: list[Leftover]) -> None:
    """Remove them; worktrees by way of git, which would otherwise go on listing them."""
    worktree.prune(root)
    for leftover in leftovers:
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path, ignore_errors=True)
        else:
            leftover.path.unlink(missing_ok=True)


def newest(folder: Path) -> float:
    """When a folder, or anything below it, was last written (seconds since the epoch)."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that is still going by its status, and whose training nobody can go on with.

    Args:
        run_id: Its id.
        name: What it is called.
        why: Why its checkpoints go.
    """

    run_id: str
    name: str
    why: str


def find_unfinished_runs(root: Path, leftovers: Iterable[Leftover]) -> tuple[Tracking | None, list[UnfinishedRun]]:
    """The runs that were begun by trainings whose checkpoints are among what can go.

    Args:
        root: The checkout.
        leftovers: What can go.

    Returns:
        The store and the runs; None and none when no such training has begun a run.

    Raises:
        ValueError: The tracking store can't be used, or a key is damaged.
    """
    begun = [one for one in leftovers if (one.path / KEY_FILE).exists() and not (one.path / FINISHED).exists()]
    if not begun:
        return None, []
    tracking = open_tracking(load_params(root / "params.yaml").publish, main_checkout(root))
    found = []
    for one in begun:
        for run_id in tracking.find_unfinished(KEY_TAG, str(read_json(one.path / KEY_FILE)["key"])):
            run = tracking.client.get_run(run_id)
            if run.info.status == "RUNNING":
                found.append(UnfinishedRun(run_id, run.info.run_name, one.why))
    return tracking, found


def end_unfinished_runs(tracking: Tracking, runs: Iterable[UnfinishedRun]) -> None:
    """Mark them as killed, with the reason in the tag that says how far a run came."""
    for run in runs:
        tracking.client.set_tag(run.run_id, PROGRESS_TAG, f"given up, its checkpoints were removed: {run.why}")
        tracking.client.set_terminated(run.run_id, "KILLED")
