"""Lineage: what is read from git and dvc.lock, and when two results are the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stages.checkout.paths import Paths, main_checkout
from stages.tracking.lineage import (
    changed_code,
    dvc_data_hashes,
    dvc_hashes,
    flatten,
    git_diff,
    git_state,
    result_digest,
    result_params,
    versions,
)
from tests.stages.tiny_run import tiny_params


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "reports" / "metrics").mkdir(parents=True)
    for name in ("code.py", "dvc.lock", "reports/metrics/train.json"):
        (root / name).write_text("1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_what_a_run_writes_itself_does_not_make_the_checkout_dirty(checkout: Path) -> None:
    (checkout / "dvc.lock").write_text("2\n")
    (checkout / "reports/metrics/train.json").write_text("2\n")
    (checkout / "untracked.py").write_text("2\n")
    state = git_state(checkout)
    assert state is not None
    assert not state.dirty
    assert git_diff(checkout) == ""


def test_changed_code_does_and_is_in_the_patch(checkout: Path) -> None:
    (checkout / "code.py").write_text("2\n")
    state = git_state(checkout)
    assert state is not None
    assert state.changed == ("code.py",)
    assert "+2" in git_diff(checkout)


def test_changed_code_has_a_digest_that_params_and_data_do_not_change(checkout: Path) -> None:
    for name in ("params.yaml", "data/rows.jsonl"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("1\n")
        git(checkout, "add", name)
        assert changed_code(checkout) == "none"
    (checkout / "code.py").write_text("2\n")
    first = changed_code(checkout)
    (checkout / "code.py").write_text("3\n")
    assert len({"none", first, changed_code(checkout)}) == 3


def test_outside_of_git_and_before_the_first_commit_there_is_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None
    assert git_diff(tmp_path) == ""


def test_worktree_belongs_to_its_main_checkout(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    assert main_checkout(tmp_path / "tree") == checkout
    assert main_checkout(checkout) == checkout
    assert main_checkout(tmp_path) == tmp_path


def test_temporary_folder_of_an_experiment_belongs_to_the_checkout_in_which_it_was_started(checkout: Path) -> None:
    folder = checkout / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    assert main_checkout(folder) == checkout
    worktree = checkout.with_name("tree")
    git(checkout, "worktree", "add", "-q", "--detach", str(worktree))
    assert main_checkout(worktree / ".dvc" / "tmp" / "exps" / "tmpabc") == checkout


def test_project_in_a_subfolder_of_its_repository_is_its_own_main_checkout(checkout: Path, tmp_path: Path) -> None:
    (checkout / "ml").mkdir()
    (checkout / "ml" / "code.py").write_text("1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "second")
    git(checkout, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    assert main_checkout(checkout / "ml") == checkout / "ml"
    assert main_checkout(tmp_path / "tree" / "ml") == checkout / "ml"


def test_changed_files_are_named_as_they_are_called(checkout: Path) -> None:
    name = "Prüfung (neu).py"
    (checkout / name).write_text("1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "second")
    (checkout / name).write_text("2\n")
    (checkout / "code.py").write_bytes(b"\xff\n")
    state = git_state(checkout)
    assert state is not None
    assert set(state.changed) == {name, "code.py"}
    assert "+2" in git_diff(checkout)


def test_hashes_come_from_dvc_lock(tmp_path: Path) -> None:
    assert dvc_hashes(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  load:\n    cmd: x\n    deps:\n"
        "    - {path: data/a.jsonl, hash: md5, md5: aa, size: 1}\n"
        "    outs:\n    - {path: outs/load, hash: md5, md5: bb.dir, size: 1}\n"
        "  publish:\n    cmd: x\n    deps:\n    - {path: outs/load, hash: md5, md5: of-its-last-run.dir, size: 1}\n"
    )
    assert dvc_hashes(tmp_path) == {"data/a.jsonl": "aa", "outs/load": "bb.dir"}


def test_code_is_no_data_whether_a_file_or_a_room_is_recorded(tmp_path: Path) -> None:
    names = ("sft/labels.py", "sft/data", "stages/pages/templates", "stages/load.py", "data", "outs/load", "tasks")
    entries = "".join(f"    - {{path: {name}, hash: md5, md5: aa, size: 1}}\n" for name in names)
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  load:\n    cmd: x\n    deps:\n{entries}")
    assert list(dvc_hashes(tmp_path)) == list(names)
    assert list(dvc_data_hashes(tmp_path)) == ["data", "outs/load", "tasks"]


def test_digest_depends_on_params_and_files_but_not_on_where_they_are_published(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("1")
    paths = Paths(tmp_path)
    first = result_digest(tiny_params(), paths, [file])
    assert result_digest(tiny_params(publish={"experiment": "other"}), paths, [file]) == first
    assert result_digest(tiny_params(train={"seed": 1}), paths, [file]) != first
    file.write_text("2")
    assert result_digest(tiny_params(), paths, [file]) != first


def test_params_are_flat_and_leave_publish_out() -> None:
    flat = result_params(tiny_params())
    assert flat["train.learning_rate"] > 0
    assert not any(name.startswith("publish.") for name in flat)
    assert flatten({"a": {"b": {"c": 1}}, "d": [{"e": 2}]}) == {"a.b.c": 1, "d": [{"e": 2}]}


def test_versions_contain_python_and_the_packages_that_compute() -> None:
    assert {"python", "torch", "transformers"} <= set(versions())
