"""Kinds of checkouts: awkward paths, DVC's cache types, its experiments, worktrees, shallow clones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.test_operations import commit
from tests.test_pipeline import ROOT, call, change_params, environment, files_below, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout at an awkward path whose pipeline has run by `make`; the base model is not in git."""
    folder = tmp_path_factory.mktemp("Prüfung (2. Teil) it's")
    project = make_project(folder / "pro jekt")
    shutil.copyfile(ROOT / "Makefile", project / "Makefile")
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.lock", "requirements.hashes"):
        (project / name).touch()
    (project / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (project / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (project / ".venv" / ".ready").touch()  # newer than the requirements, so that make installs nothing
    (project / ".gitignore").write_text((project / ".gitignore").read_text() + "/base/\n.venv\n")
    call(project, "git", "rm", "-rq", "--cached", "base")
    commit(project)
    call(project, "make", "repro")
    commit(project)
    return project


@pytest.fixture
def plain(project: Path, tmp_path: Path) -> Path:
    """A copy at a path with a space and parentheses, but without umlauts, which DVC's experiments can't have."""
    copy = shutil.copytree(project, tmp_path / "pro (jekt)" / "copy", symlinks=True)
    (copy / "mlflow.db").unlink()
    return copy


def recorded(project: Path) -> tuple[str, list[str]]:
    """The run that run.json names, and the finished runs of the checkout's store."""
    named = json.loads((project / "outs" / "publish" / "run.json").read_text(encoding="utf-8"))["run_id"]
    with sqlite3.connect(project / "mlflow.db") as store:
        return named, [row[0] for row in store.execute("select run_uuid from runs where status = 'FINISHED'")]


def test_make_and_the_record_work_at_any_path(project: Path) -> None:
    named, finished = recorded(project)
    assert finished == [named]
    assert "Data and pipelines are up to date." in call(project, "make", "repro")
    assert (project / "mlartifacts" / "sft" / named / "artifacts" / "reports" / "report.html").is_file()


@pytest.mark.parametrize("kind", ["hardlink", "symlink", "copy", "reflink,copy"])
def test_stages_find_a_relative_base_model_whatever_dvc_links(project: Path, tmp_path: Path, kind: str) -> None:
    copy = shutil.copytree(project, tmp_path / "Kopie ä" / "project", symlinks=True)
    call(copy, "dvc", "config", "cache.type", kind)
    call(copy, "dvc", "checkout", "--relink")
    record = copy / "outs" / "load" / "base_model.json"
    assert record.is_symlink() == (kind == "symlink")
    assert (record.stat().st_nlink > 1) == (kind == "hardlink")
    change_params(copy, {"evaluate": {"max_new_tokens": 9}})

    assert "Running stage 'evaluate'" in call(copy, "dvc", "repro")

    named, finished = recorded(copy)
    assert named in finished
    assert call(copy, "dvc", "status").strip() == "Data and pipelines are up to date."


def test_experiment_in_a_temporary_folder_is_recorded_by_the_checkout_that_started_it(plain: Path) -> None:
    call(plain, "dvc", "exp", "run", "--temp", "-n", "first", "-S", "evaluate.max_new_tokens=9")
    assert not list((plain / ".dvc" / "tmp" / "exps").rglob("mlflow.db"))
    call(plain, "dvc", "exp", "apply", "first")
    named, finished = recorded(plain)
    assert finished == [named]
    call(plain, "git", "checkout", "--", ".")
    call(plain, "dvc", "exp", "run", "--queue", "-n", "second", "-S", "evaluate.max_new_tokens=10")
    call(plain, "dvc", "exp", "run", "--run-all")
    call(plain, "dvc", "exp", "apply", "second")
    named, finished = recorded(plain)
    assert len(finished) == 2
    assert named in finished


def test_shallow_clone_and_worktree_restore_every_result(project: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    call(copy, "dvc", "remote", "add", "--force", "--default", "store", str(tmp_path / "Spei cher"))
    call(copy, "dvc", "push", "--run-cache")
    commit(copy)
    call(tmp_path, "git", "clone", "-q", "--depth", "1", copy.as_uri(), str(tmp_path / "shallow clone"))
    call(copy, "git", "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    for clone in (tmp_path / "shallow clone", tmp_path / "tree"):
        call(clone, "dvc", "pull", "--run-cache")
        assert files_below(clone / "outs") == files_below(copy / "outs")
        call(clone, "dvc", "gc", "--workspace", "--force")
        assert call(clone, "dvc", "status").strip() == "Data and pipelines are up to date."
        assert "Running stage" not in call(clone, "dvc", "repro")
    # a worktree finds the base model of its main checkout
    call(tmp_path / "tree", "python", "-m", "stages", "check")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ends process trees by Linux' means")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_make_ends_the_stage_and_what_was_recorded_comes_back(
    project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    change_params(copy, {"train": {"max_steps": 2000}})
    process = subprocess.Popen(
        ["make", "repro"], cwd=copy, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("train: 20 of 2000 steps"):
        assert process.poll() is None
    tree = psutil.Process(process.pid).children(recursive=True)
    assert any("train" in one.cmdline() for one in tree)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []
    process.communicate()
    assert process.returncode != 0
    call(copy, "git", "checkout", "--", "params.yaml")
    assert "Running stage" not in call(copy, "dvc", "repro")
