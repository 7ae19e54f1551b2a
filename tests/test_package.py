"""The installed package: what a wheel holds, and that it works in another folder than the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("sft", "stages", "flows")
DVC_FILES = (".gitignore", "config", "plots/curve.json", "plots/page.html")
BUNDLED = "stages/project/files"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel of this checkout's tracked files."""
    root = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE", "params.yaml", "dvc.yaml", "prefect.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root / name)
    for folder in (*FLOORS, "data", "tasks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in DVC_FILES:
        (root / ".dvc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / ".dvc" / name, root / ".dvc" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(root / "wheels")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(root)], check=True)
    (wheel,) = (root / "wheels").glob("sft_pipeline-0.1.0-*.whl")  # the version where there is no git
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "installed")
    return root / "installed"


def run_elsewhere(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_wheel_holds_every_file_of_every_room(installed: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {
        path.relative_to(installed).as_posix()
        for floor in FLOORS
        for path in (installed / floor).rglob("*")
        if path.is_file()
    }
    shipped = {name.removeprefix(f"{BUNDLED}/") for name in found if name.startswith(BUNDLED)}
    assert shipped == {
        *(f".dvc/{name}" for name in DVC_FILES),
        ".dvcignore",
        "data/shop_eval.jsonl",
        "data/shop_train.jsonl",
        "dvc.yaml",
        "params.yaml",
        "prefect.yaml",
        *(f"tasks/{path.name}" for path in (ROOT / "tasks").iterdir() if path.is_file()),
    }
    found = {name for name in found if not name.startswith(BUNDLED)}
    assert {"sft/py.typed", "sft/chat/templates/chatml.jinja", "stages/pages/templates/style.css"} <= found
    assert found == expected


def test_installed_library_works_in_another_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sft; print(sft.__file__, sft.SFTTrainer.__module__, sft.setup_chat_format.__module__)\n"
        "from sft.chat.formats import FORMATS; print(len(FORMATS))\n"
        "from stages.pages.page import TEMPLATES; print((TEMPLATES / 'style.css').is_file())\n"
    )
    origin, trainer, formats, num_formats, is_there = run_elsewhere(installed, tmp_path, "-c", code).split()
    assert Path(origin).parent == installed / "sft"
    assert (trainer, formats) == ("sft.train.trainer", "sft.chat.formats")
    assert int(num_formats) >= 6
    assert is_there == "True"


def test_installed_pipeline_prints_its_help_in_another_folder(installed: Path, tmp_path: Path) -> None:
    assert "publish" in run_elsewhere(installed, tmp_path, "-m", "stages", "--help")


def test_installed_package_makes_a_project_that_dvc_reads(installed: Path, tmp_path: Path) -> None:
    run_elsewhere(installed, tmp_path, "-m", "stages", "init", "--no-git")
    digests = json.loads((tmp_path / ".sft" / "code" / "load.json").read_text(encoding="utf-8"))
    assert digests["stages/load.py"] == hashlib.sha256((installed / "stages" / "load.py").read_bytes()).hexdigest()
    names = run_elsewhere(installed, tmp_path, "-m", "dvc", "stage", "list", "--name-only").split()
    assert names == ["code", "load", "format", "pack", "train", "merge", "quantize", "evaluate", "publish"]
    assert run_elsewhere(installed, tmp_path, "-m", "stages", "code") == ".sft/code: no stage changed\n"
