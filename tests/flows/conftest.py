"""A small git and DVC project with three trivial stages, and a Prefect server for all of tests/flows."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Prefect reads its settings at import; the flows would otherwise use the home of the checkout.
os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="prefect-home-"))
# for the server of Prefect's test harness; flows refuse to start such a server
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")

from flows.processes.environment import ROOT, child_environment
from stages.params.assignments import apply_overrides

DVC_YAML = """\
stages:
  train:
    cmd: bash train.sh
    deps: [outs/pack.txt, train.sh]
    params: [train]
    outs: [outs/train.txt]
    metrics:
      - reports/metrics/train.json: {cache: false}
  load:
    cmd: mkdir -p outs reports/metrics && cat data/rows.txt > outs/load.txt
    deps: [data]
    params: [load]
    outs: [outs/load.txt]
  pack:
    cmd: bash pack.sh
    deps: [outs/load.txt, pack.sh]
    params: [pack]
    outs: [outs/pack.txt]
"""
PACK_SH = """\
echo 'PROGRESS {"stage": "s", "done": 1, "total": 2, "part": "parts", "text": "half"}'
echo 'PROGRESS {"stage": "s", "done": 2, "total": 2, "part": "parts", "text": "whole"}'
echo packed >> ran.log
cp outs/load.txt outs/pack.txt
"""
TRAIN_SH = """\
mkdir -p reports/metrics
echo trained >> ran.log
cp outs/pack.txt outs/train.txt
grep "  learning_rate" params.yaml >> outs/train.txt
echo '{"loss": 1.25, "rows": {"train": 2}}' > reports/metrics/train.json
"""


KNOWN = {
    "model": {"revision": None},
    "load": {"eval": {"path": "data/eval.jsonl", "fraction": None}},
    "pack": {"max_length": 512},
    "train": {"lora_r": 16, "learning_rate": 0.001},
}


def known_params() -> str:
    """The repository's params.yaml with the values that tests change set to what the tests expect."""
    return apply_overrides((ROOT / "params.yaml").read_text(encoding="utf-8"), KNOWN)


def replace_param(project: Path, old: str, new: str) -> None:
    """Edit params.yaml as a user would."""
    params = (project / "params.yaml").read_text(encoding="utf-8")
    assert old in params
    (project / "params.yaml").write_text(params.replace(old, new), encoding="utf-8")


def run(project: Path, *command: str) -> str:
    """Run a tool in the project; a failure shows its output."""
    result = subprocess.run(command, cwd=project, env=child_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def commit(project: Path) -> None:
    """Commit everything that git does not ignore."""
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "state")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("template") / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "rows.txt").write_text("one\ntwo\n")
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "pack.sh").write_text(PACK_SH)
    (project / "train.sh").write_text(TRAIN_SH)
    (project / ".gitignore").write_text(".state/\n.worktrees/\n/outs/\n/reports/\nran.log\n")
    (project / ".dvcignore").write_text(".state\n.worktrees\n")
    (project / "params.yaml").write_text(known_params(), encoding="utf-8")
    run(project, "git", "init", "--quiet")
    run(project, "git", "config", "user.email", "test@localhost")
    run(project, "git", "config", "user.name", "test")
    run(project, sys.executable, "-m", "dvc", "init", "--quiet")
    commit(project)
    return project


@pytest.fixture(scope="session")
def ran_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("ran") / "project"
    shutil.copytree(template, project, symlinks=True)
    run(project, sys.executable, "-m", "dvc", "repro", "--quiet")
    (project / "ran.log").unlink()
    commit(project)
    return project


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the project, which is also the working directory."""
    shutil.copytree(template, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def ran_project(ran_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with every stage up to date, and dvc.lock committed."""
    shutil.copytree(ran_template, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
        # at exit, Prefect logs to a stream that pytest has closed
        logging.getLogger("prefect").setLevel(logging.CRITICAL)
