"""What runs leave behind: worktrees of the dead, checkpoints that nobody will resume, old logs."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from flows.runs import worktree
from stages.launch.lock_holders import trainings_at_work

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
