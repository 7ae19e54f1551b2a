"""Temporary git worktrees below `.worktrees/`, each locked for as long as the process that made it uses it.

The lock of `.worktrees/NAME` is a file `.worktrees/NAME.lock`, locked by `flock`. The kernel releases it when its
process ends, however it ends, so that an unlocked file marks a worktree whose process has ended: `prune` removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from configobj import ConfigObj
from dvc.exceptions import DvcException
from dvc.repo import Repo

FOLDER = ".worktrees"


class WorktreeError(ValueError):
    """A git command failed, or another process uses the worktree."""


@contextmanager
def locked_worktree(
    root: Path, name: str, commit: str = "HEAD", *, wait: bool = True, keep: bool = False
) -> Iterator[Path]:
    """Check out a commit into `.worktrees/NAME`, lock it for the time of the block, and remove it afterwards.

    Worktrees of processes that have ended are removed first, and so is a kept worktree of the same name.

    Args:
        root: The checkout.
        name: Name of the worktree.
        commit: What to check out.
        wait: Wait while another process uses a worktree of this name, instead of raising.
        keep: Don't remove the worktree after the block; `prune` will not remove it either.

    Yields:
        The worktree's root.

    Raises:
        WorktreeError: git can't check out the commit, or another process uses the worktree.
    """
    prune(root)
    path = root / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    lock = _acquire(_lock_of(path), wait)
    if lock is None:
        raise WorktreeError(f"{path}: another process is using this worktree")
    with lock:
        try:
            _remove(root, path)
            git(root, "worktree", "add", "--detach", "--quiet", str(path), commit)
            yield path
        finally:
            if not keep:
                _remove(root, path)
            _lock_of(path).unlink(missing_ok=True)


def prune(root: Path) -> None:
    """Remove the worktrees whose processes have ended.

    Raises:
        WorktreeError: git can't forget a removed worktree.
    """
    for path in _locks(root):
        lock = _acquire(path, wait=False)
        if lock is not None:
            with lock:
                _remove(root, path.with_suffix(""))
                path.unlink(missing_ok=True)


def abandoned(root: Path) -> list[Path]:
    """Return the worktrees whose processes have ended."""
    return [lock.with_suffix("") for lock in _locks(root) if not _is_held(lock) and lock.with_suffix("").exists()]


def living(root: Path) -> list[str]:
    """Return the names of the worktrees that are in use."""
    return [lock.stem for lock in _locks(root) if _is_held(lock)]


def dvc_cache(root: Path) -> Path:
    """Return the folder of a checkout's DVC cache."""
    with Repo(str(root)) as repo:
        return Path(repo.cache.legacy.path)


def use_dvc_cache(path: Path, cache: Path) -> None:
    """Make a checkout use this DVC cache; its other local DVC settings are kept.

    DVC itself writes no settings that are not ASCII, such as the path of a cache.
    """
    file = path / ".dvc" / "config.local"
    settings = ConfigObj(str(file), encoding="utf-8")
    settings.setdefault("cache", {})["dir"] = str(cache)
    settings.write()


def git(root: Path, *arguments: str) -> str:
    """Run a git command and return what it prints.

    Raises:
        WorktreeError: It failed; the message has what git printed.
    """
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise WorktreeError(f"git {' '.join(arguments)}: {' '.join(result.stderr.split())}")
    return result.stdout.rstrip("\n")


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _locks(root: Path) -> list[Path]:
    return sorted((root / FOLDER).glob("*.lock"))


def _acquire(path: Path, wait: bool) -> IO[str] | None:
    """Create and lock a lock file; return None if another process has locked it and `wait` is off."""
    while True:
        file = path.open("a")
        if not _flock(file, wait):
            file.close()
            return None
        if _is_file_at(file, path):
            return file
        # another process deleted the file after it was opened here, so that this lock excludes no one
        file.close()


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_held(path: Path) -> bool:
    try:
        with path.open() as file:
            return not _flock(file, wait=False)
    except FileNotFoundError:
        return False


def _flock(file: IO[str], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(root: Path, path: Path) -> None:
    if path.exists():
        _remove_site_cache(path)
        shutil.rmtree(path, ignore_errors=True)
    git(root, "worktree", "prune")


def _remove_site_cache(path: Path) -> None:
    """Remove the hashes that DVC keeps of a project outside of it, by its path; DVC itself never removes them."""
    try:
        with Repo(str(path)) as repo:
            site_cache = Path(repo.site_cache_dir)
    except DvcException:
        return
    shutil.rmtree(site_cache, ignore_errors=True)
