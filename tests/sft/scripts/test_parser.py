"""The command line of scripts: several dataclasses, and the file of --config."""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sft.config import ModelConfig, SFTConfig
from sft.scripts.arguments import DatasetConfig, DatasetMixtureConfig, ScriptArguments
from sft.scripts.parser import TrlParser


@dataclass
class Needed:
    number: int
    word: str = "default"


@dataclass
class Options:
    length: int | None = 1024
    flag: bool = False
    maybe: bool | None = None
    save_strategy: str = "steps"
    names: list[str] | None = None
    share: float = 0.5


@dataclass
class First:
    trust: bool = False
    own: int = 1


@dataclass
class Second:
    trust: bool = False
    other: int = 2


@dataclass
class AtConstruction:
    trust: InitVar[bool] = False

    def __post_init__(self, trust: bool) -> None:
        self.trust = trust


@dataclass
class OtherDefault:
    trust: bool = True


@dataclass
class Reserved:
    config: str = ""


def parsed(kinds: Any, *args: str, **how: Any) -> Any:
    return TrlParser(kinds).parse_args_and_config(list(args), **how)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "options.yaml").write_text(text)
        return str(tmp_path / "options.yaml")

    return write


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
def test_values_of_the_file_replace_defaults_and_the_command_line_wins(config: Any, spelling: str) -> None:
    args = spelling.format(config("number: 2\nword: file")).split()
    assert parsed(Needed, *args) == (Needed(2, "file"),)
    assert parsed(Needed, "--number", "3", *args) == (Needed(3, "file"),)


def test_environment_of_the_file_is_set(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_FILE", "before")
    parsed(Needed, "--config", config("env: {OF_THE_FILE: 1}\nnumber: 2"))
    assert os.environ["OF_THE_FILE"] == "1"


def test_values_of_the_file_are_converted_as_on_a_command_line(config: Any) -> None:
    text = "length: null\nflag: yes\nmaybe: false\nsave_strategy: no\nnames: one\nshare: 1"
    (options,) = parsed(Options, "--config", config(text))
    assert options == Options(None, True, False, "no", ["one"], 1.0)


def test_numbers_and_booleans_that_may_be_none_are_given_as_words(config: Any) -> None:
    assert parsed(Options, "--length", "None", "--maybe", "null") == (Options(length=None, maybe=None),)
    assert parsed(Options, "--config", config("length: none")) == (Options(length=None),)


@pytest.mark.parametrize("text", ["length: 5.5", "length: many", "flag: perhaps", "share: [a"])
def test_values_that_do_not_fit_end_the_script_with_a_message(
    config: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parsed(Options, "--config", config(text))
    assert exit.value.code == 2
    assert "error: --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "missing.yaml"], "--config missing.yaml can't be read: No such file"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times"),
    ],
)
def test_a_file_that_is_not_there_ends_the_script_with_a_message(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(Options, *args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght: 5", r"'lenght' \(did you mean 'length'\?\)"),
        ("- length", "must contain a YAML mapping"),
        ("env: 3", "`env` field should be a dict in the YAML file"),
    ],
)
def test_files_that_are_no_options_are_refused(config: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(Options, "--config", config(text))


def test_unknown_options_can_be_left_out_or_returned(config: Any) -> None:
    file = config("length: 5\nother: abc")
    assert parsed(Options, "--config", file, fail_with_unknown_args=False) == (Options(5),)
    rest = ["--config", file, "--more", "def"]
    assert parsed(Options, *rest, return_remaining_strings=True)[1] == ["--other", "abc", "--more", "def"]
    apart = parsed(Options, *rest, return_remaining_strings=True, separate_remaining_strings=True)
    assert apart[1:] == (["--other", "abc"], ["--more", "def"])


def test_defaults_can_be_set_by_hand() -> None:
    parser = TrlParser([Needed])
    assert parser.set_defaults_with_config(number=42, unknown=1) == ["--unknown", "1"]
    assert parser.parse_args_and_config([]) == (Needed(42),)


def test_file_reaches_all_subparsers(config: Any) -> None:
    parser = TrlParser()
    subparsers = parser.add_subparsers(dest="command", parser_class=TrlParser)
    for name in ("one", "two"):
        subparsers.add_parser(name, dataclass_types=[Needed])
    for name in ("one", "two"):
        (found,) = parser.parse_args_and_config([name, "--config", config("number: 2\nword: file")])
        assert (found.command, found.number, found.word) == (name, 2, "file")


def test_option_of_two_dataclasses_is_one_option_for_both() -> None:
    assert parsed((First, Second), "--trust", "--other", "5") == (First(True, 1), Second(True, 5))
    assert parsed((First, AtConstruction), "--trust")[1].trust is True


def test_option_with_two_defaults_is_refused() -> None:
    with pytest.raises(ValueError, match="two dataclasses have the option --trust, with the defaults False and True"):
        TrlParser((First, OtherDefault))


def test_field_that_would_hide_the_file_is_refused() -> None:
    with pytest.raises(ValueError, match="has a field named 'config'"):
        TrlParser(Reserved)


def test_options_added_by_hand_come_as_a_namespace() -> None:
    parser = TrlParser(Options)
    parser.add_argument("--extra", default="x")
    assert vars(parser.parse_args_and_config(["--extra", "y"])[1]) == {"extra": "y"}


def test_all_options_of_a_script_are_read_from_one_file(config: Any, tmp_path: Path) -> None:
    text = f"""
model_name_or_path: folder
output_dir: {tmp_path / "out"}
learning_rate: 2e-4
save_strategy: no
packing: true
report_to: none
model_init_kwargs: {{use_cache: no}}
lora_target_modules: all-linear
datasets:
  - path: first
  - {{path: second, columns: [messages], fraction: 0.5}}
use_cpu: true
"""
    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    script, training, model, mixture = parsed(kinds, "--config", config(text), "--max_length", "64")
    assert script == ScriptArguments()
    assert (training.learning_rate, training.save_strategy, training.packing, training.max_length) == (
        2e-4,
        "no",
        True,
        64,
    )
    assert (training.report_to, training.model_init_kwargs) == ([], {"use_cache": False})
    assert (model.model_name_or_path, model.lora_target_modules) == ("folder", "all-linear")
    assert mixture.datasets == [DatasetConfig("first"), DatasetConfig("second", columns=["messages"], fraction=0.5)]


def test_paths_of_a_mixture_are_given_on_a_command_line() -> None:
    (mixture,) = parsed(DatasetMixtureConfig, "--datasets", "first", "second", "--test_split_size", "0.5")
    assert mixture == DatasetMixtureConfig([DatasetConfig("first"), DatasetConfig("second")], test_split_size=0.5)


def test_default_factories_of_shared_options_are_compared_by_value() -> None:
    @dataclass
    class One:
        names: list[str] = field(default_factory=list)

    @dataclass
    class Two:
        names: list[str] = field(default_factory=list)

    # names of classes inside a function can't be looked up
    One.__annotations__["names"] = Two.__annotations__["names"] = list[str]
    assert parsed((One, Two), "--names", "a", "b") == (One(["a", "b"]), Two(["a", "b"]))
