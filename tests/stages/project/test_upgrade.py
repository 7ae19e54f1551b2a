"""`sft upgrade`: what an installed version adds to a project of an earlier one, and what stays as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stages.__main__ import main
from stages.params.schema import Params, check_params, load_params, model_at
from stages.params.text import entry_lines, neutral_values, params_text
from stages.project.additions import add_missing
from stages.project.written import NEW, WRITTEN
from tests.stages.project.test_init import init

VALUES = check_params({**neutral_values(), "model": {**neutral_values()["model"], "name_or_path": "a/b"}}).model_dump()


LAST = f"publish.{list(VALUES['publish'])[-1]}"


def lines_of(name: str) -> str:
    """The lines of a key in a params.yaml with the values of `VALUES`."""
    *parents, last = name.split(".")
    value: Any = VALUES
    for part in (*parents, last):
        value = value[part]
    field = (model_at(Params, tuple(parents)) or Params).model_fields[last]
    return "\n".join(entry_lines(last, value, len(parents), field)) + "\n"


@pytest.mark.parametrize(
    "name",
    [
        "model.dtype",
        "load.checks.mojibake",
        "load.images",
        "pack.strategy",
        "train.launch.engine",
        LAST,
    ],
)
def test_a_key_is_written_where_it_was(name: str) -> None:
    text = params_text(VALUES)
    assert text.count(lines_of(name)) == 1
    added = add_missing(text.replace(lines_of(name), ""))
    assert list(added.values) == [name]
    assert added.text == text


def test_several_keys_and_a_section_are_added_and_lines_of_the_owner_stay() -> None:
    text = params_text(VALUES)
    mine = text.replace(lines_of("train.lora_r"), "").replace(lines_of("train.lora_alpha"), "")
    mine = mine.replace(lines_of("format.thinking"), "") + "# my own last words\n"
    added = add_missing(mine)
    assert list(added.values) == ["format.thinking", "train.lora_r", "train.lora_alpha"]
    assert added.text == text + "# my own last words\n"


def test_a_section_in_braces_gets_its_keys_too() -> None:
    text = params_text(VALUES)
    start, end = text.index("model:"), text.index("load:")
    mine = f"{text[:start]}model: {{name_or_path: a/b, revision: null}}\n{text[end:]}"
    added = add_missing(mine)
    assert set(added.values) == {f"model.{name}" for name in VALUES["model"]} - {"model.name_or_path", "model.revision"}
    assert "# " in added.text


def test_what_lacks_nothing_is_not_changed() -> None:
    text = (Path(__file__).resolve().parents[3] / "params.yaml").read_text(encoding="utf-8")
    assert add_missing(text).text == text


def upgrade(root: Path, *arguments: str, code: int = 0) -> None:
    assert main(["upgrade", "--root", str(root), *arguments], through_dvc=True) == code


def test_a_project_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(str(tmp_path))
    values = load_params(tmp_path / "params.yaml")
    params = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    line = next(line for line in params.splitlines(keepends=True) if line.startswith("  desc_act: "))
    (tmp_path / "params.yaml").write_text(params.replace(line, ""), encoding="utf-8")
    dvc = (tmp_path / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(f"{dvc}# mine\n", encoding="utf-8")
    (tmp_path / "prefect.yaml").unlink()
    capsys.readouterr()
    upgrade(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "params.yaml: quantize.desc_act added, False",
        f"dvc.yaml: kept, as it was changed; compare it with {NEW}/dvc.yaml, or renew it by `sft upgrade --replace "
        "dvc.yaml`",
        "prefect.yaml: written",
    ]
    assert load_params(tmp_path / "params.yaml") == values
    assert (tmp_path / NEW / "dvc.yaml").read_text(encoding="utf-8") == dvc
    upgrade(tmp_path, "--replace", "dvc.yaml")
    assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == dvc
    capsys.readouterr()
    upgrade(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}: all files are those of this version\n"


def test_files_of_the_package_are_renewed_and_those_of_the_owner_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(str(tmp_path))
    # as if an earlier version had written it
    (tmp_path / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    noted = (tmp_path / WRITTEN).read_text(encoding="utf-8")
    digest = hashlib.sha256((tmp_path / "dvc.yaml").read_bytes()).hexdigest()
    lines = [f'  "dvc.yaml": "{digest}",' if '"dvc.yaml"' in line else line for line in noted.splitlines()]
    (tmp_path / WRITTEN).write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tasks" / "own.py").write_text("# mine\n", encoding="utf-8")
    capsys.readouterr()
    upgrade(tmp_path)
    assert capsys.readouterr().out == "dvc.yaml: renewed\n"
    assert "stages/code" not in (tmp_path / "dvc.yaml").read_text(encoding="utf-8")
    assert (tmp_path / "tasks" / "own.py").read_text(encoding="utf-8") == "# mine\n"


def test_what_is_no_project_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upgrade(tmp_path, code=1)
    assert capsys.readouterr().err == f"error: {tmp_path} has no params.yaml and dvc.yaml; `sft init` makes a project\n"
    init(str(tmp_path))
    upgrade(tmp_path, "--replace", "params.yaml", code=1)
    assert "error: --replace params.yaml: not one of" in capsys.readouterr().err
