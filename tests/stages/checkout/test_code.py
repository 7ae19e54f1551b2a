"""Digests of the code that each stage uses: as fine as the list in dvc.yaml, and heeded by plain `dvc repro`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.checkout.code import DIGESTS, code_digests, code_files, code_version, write_code_digests
from stages.project.init import project_dvc_yaml

ROOT = Path(__file__).resolve().parents[3]
LIST = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = list(LIST["stages"])


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the code and of what comes with it, which a test may change."""
    root = tmp_path / "code"
    for name in ("sft", "stages", "flows", "data", "tasks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "prefect.yaml", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    return root


def changed_by(code: Path, name: str) -> list[str]:
    """Stages whose digests differ after a line was added to a file of the code."""
    before = {stage: code_digests(stage, code) for stage in STAGES}
    with (code / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    return [stage for stage in STAGES if code_digests(stage, code) != before[stage]]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("stages/evaluation/soundness.py", ["evaluate"]),
        ("stages/load.py", ["load"]),
        ("stages/pages/templates/data.html.jinja", ["pack", "evaluate", "publish"]),
        ("sft/models/gguf.py", ["load", "train", "quantize"]),
        ("stages/cli/commands.py", []),
        ("flows/ui.py", []),
    ],
)
def test_digests_differ_for_the_stages_that_list_a_changed_file(code: Path, name: str, stages: list[str]) -> None:
    assert changed_by(code, name) == stages


@pytest.mark.parametrize("stage", STAGES)
def test_digests_cover_what_dvc_yaml_lists_and_nothing_else(stage: str) -> None:
    listed = [dep for dep in LIST["stages"][stage]["deps"] if dep.startswith(("sft/", "stages/", "flows/"))]
    tracked = subprocess.run(["git", "ls-files", *listed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(code_files(LIST, stage)) == sorted(tracked.stdout.splitlines())


def test_a_checkout_has_no_digests_and_no_version_of_a_package() -> None:
    assert write_code_digests(ROOT) == []
    assert code_version(ROOT) is None
    assert not (ROOT / DIGESTS).exists()


def test_plain_dvc_repro_runs_the_stages_whose_code_has_changed(code: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(code), "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro() -> list[str]:
        return re.findall(r"Running stage '(\w+)'", call("dvc", "repro", "evaluate"))

    call(sys.executable, "-m", "stages", "init", "--no-git")
    text = (project / "dvc.yaml").read_text(encoding="utf-8")
    assert text == project_dvc_yaml((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    graph = YAML(typ="safe").load(text)["stages"]
    read = {dep for stage in graph.values() for dep in stage.get("deps", [])}
    for stage in STAGES:  # files in place of what the stage computes
        listed = graph[stage]["outs"] + graph[stage].get("metrics", [])
        outs = {next(iter(out)) if isinstance(out, dict) else out for out in listed}
        names = outs | {dep for dep in read if dep.startswith(f"outs/{stage}/")}
        files = [name if Path(name).suffix else f"{name}/out.txt" for name in sorted(names)]
        command = " && ".join(f"mkdir -p {Path(name).parent} && echo {stage} > {name}" for name in files)
        text = text.replace(f"cmd: python -m stages {stage}\n", f"cmd: {command}\n")
    (project / "dvc.yaml").write_text(text, encoding="utf-8")

    assert repro() == ["code", *STAGES[:-1]]
    assert repro() == ["code"]
    with (code / "stages/evaluation/soundness.py").open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert repro() == ["code", "evaluate"]
    digests = json.loads((project / DIGESTS / "evaluate.json").read_text(encoding="utf-8"))
    assert digests == code_digests("evaluate", code)
