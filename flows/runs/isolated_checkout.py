"""A temporary git worktree for a run with overrides, so that the user's own checkout is never edited.

It has a params.yaml of its own and shares the checkout's DVC cache: results that exist are restored in it instead of
computed, and the checkout can later restore what was computed in it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dvc.repo import Repo

from flows.processes.environment import child_environment
from flows.processes.supervised import run_supervised
from flows.runs.graph import Plan, RunRefused
from flows.runs.recorded import present_inputs
from stages.checkout.code import write_code_digests
from stages.checkout.worktree import WorktreeError, dvc_cache, git, locked_worktree, use_dvc_cache


@contextmanager
def isolated_checkout(root: Path, name: str, params_text: str, plan: Plan, given: list[str]) -> Iterator[Path]:
    """Check out HEAD into a worktree for the duration of one run.

    Args:
        root: The checkout in which the run was asked for.
        name: Name of the worktree: the id of the flow run.
        params_text: Content of the worktree's params.yaml.
        plan: The stages of the run, whose sources must be committed.
        given: Stages that are not run and whose recorded outs the run reads.

    Yields:
        The worktree's root. Its dvc.lock is that of the checkout, which lists what can be restored.

    Raises:
        RunRefused: Code or data that the stages read differs between the checkout and HEAD.
    """
    try:
        with locked_worktree(root, name) as path:
            use_dvc_cache(path, dvc_cache(root))
            (path / "params.yaml").write_text(params_text, encoding="utf-8")
            lock = root / "dvc.lock"
            if lock.exists():
                shutil.copyfile(lock, path / "dvc.lock")
            write_code_digests(path)
            _check_out_data(path, given)
            _refuse_other_sources(root, path, plan)
            yield path
    except WorktreeError as error:
        raise RunRefused(str(error)) from error


def refuse_uncommitted(root: Path, plan: Plan) -> None:
    """Check that the files which the stages read are committed, because a worktree contains those of HEAD.

    Raises:
        RunRefused: Names the files to commit.
    """
    paths = sorted({path for stage in plan.stages for path in stage.sources})
    try:
        changed = git(root, "status", "--porcelain", "--untracked-files=all", "--", "dvc.yaml", *paths)
    except WorktreeError as error:
        raise RunRefused(str(error)) from error
    if changed:
        files = ", ".join(line[3:] for line in changed.splitlines())
        raise RunRefused(f"a run with overrides works on a copy of the last commit; commit these first: {files}")


def _check_out_data(path: Path, given: list[str]) -> None:
    """Check out the files that DVC tracks instead of git: data with a .dvc file, and outs of the `given` stages."""
    with Repo(str(path)) as repo:
        data = [str(Path(stage.path).relative_to(path)) for stage in repo.index.stages if stage.is_data_source]
    if not data and not given:
        return
    lines: list[str] = []
    command = [sys.executable, "-m", "dvc", "checkout", *data, *given]
    if run_supervised(command, path, child_environment(), lines.append) != 0:
        reason = " ".join(line.strip() for line in lines if line.strip())
        raise RunRefused(f"{', '.join([*data, *given])}: DVC can't restore what dvc.lock records: {reason}")


def _refuse_other_sources(root: Path, path: Path, plan: Plan) -> None:
    """Check that the sources are the same in the checkout and in the worktree.

    Git does not report changes of files that it ignores.
    """
    for stage in plan.stages:
        here, there = present_inputs(root, stage.name), present_inputs(path, stage.name)
        other = [source for source in stage.sources if here.get(source) != there.get(source)]
        if other:
            raise RunRefused(
                f"{', '.join(other)}: differs from what git and DVC have recorded; commit it, or `dvc add` it if it "
                "is too large for git"
            )
