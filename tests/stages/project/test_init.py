"""`sft init`: the files of a project, in an empty folder or in a git repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.__main__ import main
from stages.params.json_schema import schema_text
from stages.params.schema import check_params, load_params
from stages.project.init import project_dvc_yaml, project_prefect_yaml
from stages.recipes.catalog import read_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[3]


def init(*arguments: str, code: int = 0) -> None:
    assert main(["init", *arguments], through_dvc=True) == code


def files_of(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] not in (".git", ".sft")
    )


FILES = [
    ".dvc/.gitignore",
    ".dvc/config",
    ".dvc/plots/curve.json",
    ".dvc/plots/page.html",
    ".dvcignore",
    ".gitignore",
    "data/shop_eval.jsonl",
    "data/shop_train.jsonl",
    "dvc.yaml",
    "params.schema.json",
    "params.yaml",
    "prefect.yaml",
    *sorted(f"tasks/{path.name}" for path in (ROOT / "tasks").iterdir() if path.is_file()),
]


def test_a_project_in_an_empty_folder(tmp_path: Path) -> None:
    root = tmp_path / "my project"
    init(str(root))
    assert files_of(root) == FILES
    assert (root / ".git").is_dir()
    assert load_params(root / "params.yaml") == load_params(ROOT / "params.yaml")
    first, *_ = (root / "params.yaml").read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=params.schema.json"
    assert (root / "params.schema.json").read_text(encoding="utf-8") == schema_text()
    before = {name: (root / name).read_bytes() for name in FILES}
    init(str(root))  # again: nothing to write
    assert {name: (root / name).read_bytes() for name in FILES} == before


def test_values_of_set_are_written(tmp_path: Path) -> None:
    init(str(tmp_path), "--no-git", "--set", "train.learning_rate=3e-4", "--set", "load.sources[0].path=data/own.csv")
    params = load_params(tmp_path / "params.yaml")
    assert (params.train.learning_rate, params.load.sources[0].path) == (3e-4, "data/own.csv")
    assert not (tmp_path / ".git").exists()
    assert "no_scm = true" in (tmp_path / ".dvc" / "config").read_text(encoding="utf-8")


def test_no_file_is_overwritten_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "params.yaml").write_text("mine: true\n", encoding="utf-8")
    (tmp_path / ".gitignore").write_text("*.log", encoding="utf-8")
    init(str(tmp_path), code=1)
    assert capsys.readouterr().err == (
        f"error: {tmp_path} has params.yaml with other content, and nothing was written; move it away, or leave it in "
        "place by --keep\n"
    )
    assert files_of(tmp_path) == [".gitignore", "params.yaml"]
    init(str(tmp_path), "--keep")
    assert files_of(tmp_path) == FILES
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == "mine: true\n"
    ignored = (tmp_path / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert ignored[:2] == ["*.log", "__pycache__/"]
    assert "no_scm" not in (tmp_path / ".dvc" / "config").read_text(encoding="utf-8")


def test_a_package_that_would_hide_the_installed_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    init(str(tmp_path), code=1)
    assert f"{tmp_path} has the Python package flows, which would hide" in capsys.readouterr().err
    assert files_of(tmp_path) == ["flows/__init__.py"]


def test_a_recipe_gives_the_values(tmp_path: Path) -> None:
    name = recipe_names()[0]
    init(str(tmp_path), "--recipe", name)
    assert load_params(tmp_path / "params.yaml").model_dump() == check_params(read_recipe(name).params()).model_dump()


def test_an_unknown_recipe_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(str(tmp_path / "new"), "--recipe", "no-such-recipe", code=1)
    assert capsys.readouterr().err.startswith("error: there is no recipe 'no-such-recipe'; ")
    assert not (tmp_path / "new").exists()


def test_the_graph_of_a_project_differs_from_this_one_in_the_code_only() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    here, there = (YAML(typ="safe").load(part) for part in (text, project_dvc_yaml(text)))
    writer = there["stages"].pop("code")
    names = [f".sft/code/{stage}.json" for stage in here["stages"]]
    assert [next(iter(out)) for out in writer["outs"]] == names
    assert writer["always_changed"] is True
    for stage, digests in zip(here["stages"].values(), names, strict=True):
        stage["deps"] = [dep for dep in stage["deps"] if not dep.startswith(("sft/", "stages/"))] + [digests]
    for stage in there["stages"].values():
        stage["deps"].sort(key=lambda dep: dep.startswith(".sft/"))
    assert there == here


def test_the_flows_of_a_project_are_modules_of_the_package() -> None:
    found = YAML(typ="safe").load(project_prefect_yaml((ROOT / "prefect.yaml").read_text(encoding="utf-8")))
    assert [entry["entrypoint"] for entry in found["deployments"]] == [
        "flows.pipeline.pipeline",
        "flows.sweep.sweep",
        "flows.nightly.nightly",
        "flows.cleanup.cleanup",
    ]
