"""The command `sft`: help without torch, suggestions, completion, options that reach their tools."""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stages.__main__ import main
from stages.cli.commands import FLOWS, STAGES, TOOLS, command_line

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
