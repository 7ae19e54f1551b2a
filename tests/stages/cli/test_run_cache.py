"""A dvc.lock from another processor: the result in the cache of this machine is restored instead of computed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.cli.run_cache import prefer_cached_results
from stages.tools.verify import verify

DVC_YAML = """\
stages:
  train:
    cmd: echo result >> ../runs.txt; cat ../rounding.txt params.yaml > out.txt; cp out.txt figures.json
    deps: [data.txt]
    params: [train]
    outs: [out.txt]
    metrics:
      - figures.json: {cache: false}
  merge:
    cmd: echo result >> ../runs.txt; cp out.txt merged.txt
    deps: [out.txt]
    outs: [merged.txt]
"""


def dvc(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the results of this machine in its cache, and the dvc.lock of one that rounds differently."""
    (tmp_path / "rounding.txt").write_text("0.11\n")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text("train: 1\n")
    (folder / "data.txt").write_text("rows\n")
    dvc(folder, "init", "--no-scm", "-q")
    dvc(folder, "repro")
    ours = (folder / "dvc.lock").read_text()
    (tmp_path / "rounding.txt").write_text("0.12\n")
    dvc(folder, "repro", "--force")
    theirs = YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"]
    for stage in theirs.values():
        for out in stage["outs"]:
            (folder / ".dvc" / "cache" / "files" / "md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)
    for name in ("out.txt", "merged.txt", "figures.json"):
        (folder / name).unlink()
    assert (folder / "dvc.lock").read_text() != ours
    (tmp_path / "runs.txt").unlink()
    return folder


def test_dvc_itself_runs_the_stage_again(project: Path) -> None:
    """The reason for the module. If this fails, DVC looks into its run cache, and the module can go."""
    dvc(project, "repro")
    assert (project.parent / "runs.txt").exists()


def test_result_of_this_machine_is_restored(project: Path) -> None:
    (told,) = [line for line in prefer_cached_results(project) if line.startswith("train: ")]
    assert "not in the cache" in told
    printed = dvc(project, "repro")
    assert printed.count("is cached - skipping run") == 2
    assert not (project.parent / "runs.txt").exists()
    assert (project / "out.txt").read_text().startswith("0.11\n")
    assert [verdict.state for verdict in verify(project)] == ["same"] * 3
    assert prefer_cached_results(project) == []


def test_stage_whose_inputs_have_changed_is_left_to_dvc(project: Path) -> None:
    before = (project / "dvc.lock").read_bytes()
    (project / "data.txt").write_text("other rows\n")
    (project / ".dvc" / "cache" / "runs").rename(project / "elsewhere")
    assert prefer_cached_results(project) == []
    assert (project / "dvc.lock").read_bytes() == before


def test_verify_names_what_was_changed(project: Path) -> None:
    prefer_cached_results(project)
    dvc(project, "repro")
    (project / "merged.txt").chmod(0o644)
    (project / "merged.txt").write_text("edited\n")
    (project / "figures.json").unlink()
    states = {verdict.path: verdict.state for verdict in verify(project)}
    assert states == {"out.txt": "same", "figures.json": "missing", "merged.txt": "changed"}
