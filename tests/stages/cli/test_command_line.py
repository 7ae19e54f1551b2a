"""The command `sft`: help without torch, suggestions, completion, options that reach their tools."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stages.__main__ import main
from stages.cli.commands import FLOWS, STAGES, TOOLS, command_line
from stages.params.schema import load_params

ROOT = Path(__file__).resolve().parents[3]


def sft(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command of this checkout as its own process."""
    code = "import sys; from stages.__main__ import console; sys.exit(console())"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_every_command_and_loads_neither_torch_nor_the_schema() -> None:
    code = """
import sys
from stages.__main__ import main
print(main(["--help"], through_dvc=True))
print(sorted({"torch", "transformers", "pydantic", "dvc", "mlflow", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, code_line, loaded = done.stdout.splitlines()
    assert (code_line, loaded) == ("0", "[]")
    listed = {line.split()[0] for line in lines if line.startswith("  ") and line.split()}
    assert {*TOOLS, *STAGES, *FLOWS, "completion"} <= listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["preview", "--rwos", "3"], "unknown option --rwos; did you mean '--rows'?"),
        (["preview", "--port", "3"], "preview does not take --port: only serve does"),
        (["preview", "--rows", "x"], "invalid value for '--rows': 'x' is not a valid integer"),
        (["repro", "tarin"], "'tarin' is not one of 'load', 'format'"),
    ],
)
def test_misspelt_words_get_a_suggestion_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words, through_dvc=True)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed


@pytest.mark.parametrize("name", [*TOOLS, *STAGES])
def test_every_option_reaches_its_tool_and_every_example_is_a_call_of_it(name: str) -> None:
    entry = (TOOLS | STAGES)[name]
    if name in TOOLS:
        taken = set(inspect.signature(importlib.import_module(entry.home).run).parameters)
        assert {option.name for option in entry.options} <= taken
    group = command_line(lambda *_, **__: 0, lambda *_: 0)
    for example in entry.examples:
        command, _, _ = example.partition(" | ")[0].partition(" < ")
        words = shlex.split(command.partition(" > ")[0])
        assert words[0] == "sft"
        context = group.make_context("sft", words[1:])
        found, command_object, rest = group.resolve_command(context, [*context.protected_args, *context.args])
        assert found == name
        assert isinstance(command_object, click.Command)
        command_object.make_context(name, rest, parent=context)


def test_every_command_that_reads_or_makes_a_params_file_takes_set() -> None:
    commands = {
        name: command
        for name, command in command_line(lambda *_, **__: 0, lambda *_: 0).commands.items()
        if name not in FLOWS
    }
    taking = {name for name, command in commands.items() if any("--set" in option.opts for option in command.params)}
    assert commands.keys() - taking == {"code", "completion"}  # neither reads a value


def test_every_flow_that_can_use_other_values_takes_set() -> None:
    code = f"""
import contextlib, importlib, io
for name in {list(FLOWS)}:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(f"flows.{{name}}").main(["--help"])
    print(name, "--set" in said.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    taking = dict(line.split() for line in done.stdout.splitlines())
    # what these do belongs to the results that the checkout itself has recorded
    assert {name for name, takes in taking.items() if takes == "False"} == {"nightly", "cleanup"}


ARGUMENTS = {
    "compare": ["a", "b"],
    "reproduce": ["a"],
    "import": ["trl", "sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name org/chats", "--force"],
    "recipes": ["qwen3.5-4b-tools"],
}


@pytest.mark.parametrize("name", [*TOOLS, *STAGES])
def test_value_of_an_unknown_key_is_refused_by_every_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    before = (tmp_path / "params.yaml").read_bytes()
    words = [name, *ARGUMENTS.get(name, ()), "--set", "train.lora_rr=8", "--root", str(tmp_path)]
    assert main(words, through_dvc=True) == 2
    assert "train.lora_rr: unknown key; did you mean 'lora_r'?" in capsys.readouterr().err
    assert (tmp_path / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["verify", "reproduce"])
def test_value_for_a_shipped_folder_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, str(tmp_path), "--set", "train.lora_r=8"], through_dvc=True) == 2
    assert "--set train.lora_r=8: a shipped folder has its own params" in capsys.readouterr().err


def test_schema_proposes_the_values_of_set(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--set", "train.lora_r=8", "--set", "train.lora_target_modules=[q_proj]"]
    assert main(["schema", "--root", str(ROOT), *values], through_dvc=True) == 0
    train = json.loads(capsys.readouterr().out)["properties"]["train"]["properties"]
    assert (train["lora_r"]["default"], train["lora_target_modules"]["default"]) == (8, ["q_proj"])
    assert main(["schema", "--root", str(ROOT), "--set", "load.sources[0].path=data/a.csv"], through_dvc=True) == 2
    assert "has no place for the value of an entry of a list" in capsys.readouterr().err


def test_recipe_and_imported_configuration_take_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "qwen3.5-4b-tools", "--set", "train.lora_r=7", "--json"], through_dvc=True) == 0
    assert json.loads(capsys.readouterr().out)["train"]["lora_r"] == 7
    assert main(["recipes", "--set", "train.lora_r=7"], through_dvc=True) == 1
    assert "name the recipe that it changes" in capsys.readouterr().err
    words = ["import", *ARGUMENTS["import"], "--set", "train.seed=7", "--root", str(tmp_path)]
    assert main(words, through_dvc=True) == 0
    assert load_params(tmp_path / "params.yaml").train.seed == 7


def test_stage_runs_by_dvc_in_sft_and_alone_in_python_m_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"], through_dvc=True) == 0
    assert "--alone" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--alone" not in capsys.readouterr().out


def test_force_of_a_stage_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--alone", "--force"], through_dvc=True) == 2
    assert "leave out --force or --alone" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_of_a_shell(shell: str) -> None:
    done = sft("completion", shell)
    assert (done.returncode, "_SFT_COMPLETE" in done.stdout) == (0, True), done.stderr


def test_keys_of_params_are_completed() -> None:
    done = sft(_SFT_COMPLETE="bash_complete", COMP_WORDS="sft check --set train.lora_", COMP_CWORD="3")
    assert "plain,train.lora_r=" in done.stdout.splitlines()
    assert all(line.startswith("plain,train.lora_") for line in done.stdout.splitlines())


def test_reader_that_ends_early_gets_no_traceback() -> None:
    code = "import sys; from stages.__main__ import console; sys.exit(console())"
    call = shlex.join([sys.executable, "-c", code, "schema"])
    done = subprocess.run(["bash", "-c", f"{call} | head -n 1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")
