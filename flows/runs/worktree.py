"""A throw-away checkout for a run with overrides, so that the user's own checkout is never edited.

It is a git worktree of HEAD below `.worktrees/`, with a params.yaml of its own. It shares the DVC cache, so what is
unchanged is restored rather than run, and the checkout can later restore what was computed here.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dvc.exceptions import DvcException
from dvc.repo import Repo

from flows.processes.environment import child_environment
from flows.processes.supervised import run_supervised
from flows.runs.graph import Plan, RunRefused
from flows.runs.recorded import present_inputs

FOLDER = ".worktrees"


@contextmanager
def isolated_checkout(root: Path, name: str, params_text: str, plan: Plan, given: list[str]) -> Iterator[Path]:
    """A worktree that exists for the time of one run.

    Args:
        root: The checkout that the run was asked of.
        name: Name of the worktree: the id of the flow run.
        params_text: What its params.yaml holds.
        plan: The stages of the run, whose sources must be committed.
        given: Stages that are not run, whose recorded outs the run reads.

    Yields:
        The worktree's root. dvc.lock is that of the checkout: it tells what can be restored.

    Raises:
        RunRefused: Code or data that the stages read differs between the checkout and HEAD.
    """
    prune(root)
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            path = _create(root, folder / name, params_text)
            _check_out_data(path, given)
            _refuse_other_sources(root, path, plan)
            yield path
        finally:
            _remove(root, folder / name)


def refuse_uncommitted(root: Path, plan: Plan) -> None:
    """A worktree shows HEAD, so what the stages read must be in it.

    Raises:
        RunRefused: Names the files to commit.
    """
    paths = sorted({path for stage in plan.stages for path in stage.sources})
    changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", "dvc.yaml", *paths)
    if changed:
        files = ", ".join(line[3:] for line in changed.splitlines())
        raise RunRefused(f"a run with overrides works on a copy of the last commit; commit these first: {files}")


def prune(root: Path) -> None:
    """Remove the worktrees of runs that are gone; those of living runs are locked and stay."""
    for lock in _locks(root):
        with lock.open("w") as file:
            if _take(file):
                _remove(root, lock.with_suffix(""))


def abandoned(root: Path) -> list[Path]:
    """Worktrees whose runs are gone."""
    return [lock.with_suffix("") for lock in _locks(root) if not _held(lock) and lock.with_suffix("").exists()]


def living(root: Path) -> list[str]:
    """Names of the runs that work in a worktree just now."""
    return [lock.stem for lock in _locks(root) if _held(lock)]


def _locks(root: Path) -> list[Path]:
    return sorted((root / FOLDER).glob("*.lock"))


def _held(lock: Path) -> bool:
    with lock.open("r") as file:
        return not _take(file)


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create(root: Path, path: Path, params_text: str) -> Path:
    _git(root, "worktree", "add", "--detach", "--quiet", str(path), "HEAD")
    with Repo(str(root)) as repo:
        cache = repo.cache.legacy.path
    (path / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n", encoding="utf-8")
    (path / "params.yaml").write_text(params_text, encoding="utf-8")
    lock = root / "dvc.lock"
    if lock.exists():
        shutil.copyfile(lock, path / "dvc.lock")
    return path


def _check_out_data(path: Path, given: list[str]) -> None:
    """Bring what DVC keeps instead of git: data with a .dvc file, and outs of stages that the run starts behind."""
    with Repo(str(path)) as repo:
        data = [str(Path(stage.path).relative_to(path)) for stage in repo.index.stages if stage.is_data_source]
    if not data and not given:
        return
    lines: list[str] = []
    command = [sys.executable, "-m", "dvc", "checkout", *data, *given]
    if run_supervised(command, path, child_environment(), lines.append) != 0:
        reason = " ".join(line.strip() for line in lines if line.strip())
        raise RunRefused(f"{', '.join([*data, *given])}: DVC can't bring back what dvc.lock records: {reason}")


def _refuse_other_sources(root: Path, path: Path, plan: Plan) -> None:
    """Catch what git does not list as changed because it ignores the file."""
    for stage in plan.stages:
        here, there = present_inputs(root, stage.name), present_inputs(path, stage.name)
        other = [source for source in stage.sources if here.get(source) != there.get(source)]
        if other:
            raise RunRefused(
                f"{', '.join(other)}: differs from what git and DVC have recorded; commit it, or `dvc add` it when it "
                "is too large for git"
            )


def _remove(root: Path, path: Path) -> None:
    if path.exists():
        _forget_site_cache(path)
        shutil.rmtree(path, ignore_errors=True)
    _git(root, "worktree", "prune")
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def _forget_site_cache(path: Path) -> None:
    """DVC keeps hashes of every project outside of it, keyed by its path; nobody else would remove them."""
    try:
        with Repo(str(path)) as repo:
            site_cache = Path(repo.site_cache_dir)
    except DvcException:
        return
    shutil.rmtree(site_cache, ignore_errors=True)


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RunRefused(f"git {' '.join(arguments)}: {' '.join(result.stderr.split())}")
    return result.stdout.rstrip("\n")
