from __future__ import annotations

from pathlib import Path

import pytest

from flows.runs.dvc_stage import Listener, Outcome, run_stage
from flows.runs.graph import RunRefused, read_plan
from flows.runs.isolated_checkout import isolated_checkout, refuse_uncommitted
from tests.flows.conftest import run

QUIET = Listener(on_line=str, on_progress=str)


def worktrees(project: Path) -> int:
    return len(run(project, "git", "worktree", "list").splitlines()) - 1


def test_worktree_has_its_own_params_and_restores_from_the_shared_cache(ran_project: Path) -> None:
    text = (ran_project / "params.yaml").read_text()
    changed = text.replace("lora_r: 16", "lora_r: 8")

    with isolated_checkout(ran_project, "run-1", changed, read_plan(ran_project), given=[]) as copy:
        assert (copy / "params.yaml").read_text() == changed
        assert run_stage(copy, "load", QUIET) is Outcome.RESTORED
        assert worktrees(ran_project) == 1

    assert (ran_project / "params.yaml").read_text() == text
    assert worktrees(ran_project) == 0
    assert list((ran_project / ".worktrees").iterdir()) == []


def test_outs_of_stages_before_the_run_are_brought_along(ran_project: Path) -> None:
    plan = read_plan(ran_project).between("pack", None)
    params = (ran_project / "params.yaml").read_text()

    with isolated_checkout(ran_project, "run-1", params, plan, given=["load"]) as copy:
        assert (copy / "outs" / "load.txt").read_text() == "one\ntwo\n"


def test_worktree_is_removed_when_its_run_fails(project: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        isolated_checkout(project, "run-1", "", read_plan(project).between("load", "load"), given=[]),
    ):
        raise KeyboardInterrupt

    assert worktrees(project) == 0


@pytest.mark.parametrize("path", ["train.sh", "data/new.txt", "dvc.yaml"])
def test_uncommitted_code_or_data_is_refused_by_name(project: Path, path: str) -> None:
    with (project / path).open("a") as file:
        file.write("# edited\n")

    with pytest.raises(RunRefused, match=f"commit these first: {path}"):
        refuse_uncommitted(project, read_plan(project))


def test_uncommitted_file_that_no_stage_reads_is_no_obstacle(project: Path) -> None:
    (project / "README.md").write_text("draft")

    refuse_uncommitted(project, read_plan(project))


def test_data_that_git_ignores_is_not_silently_left_out(project: Path) -> None:
    with (project / ".git" / "info" / "exclude").open("a") as file:
        file.write("secret.txt\n")
    (project / "data" / "secret.txt").write_text("three\n")

    with (
        pytest.raises(RunRefused, match="data: differs from what git and DVC have recorded"),
        isolated_checkout(project, "run-1", (project / "params.yaml").read_text(), read_plan(project), given=[]),
    ):
        pass
