"""`train.arguments`: options of the trainer by name, checked without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.params.arguments import KEYS, check_arguments, training_options
from stages.params.schema import ParamsError, check_params

SHIPPED = Path(__file__).resolve().parents[3] / "params.yaml"


@pytest.fixture
def values() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(SHIPPED.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dataloader_num_worker", 2, "did you mean 'dataloader_num_workers'?"),
        ("learning_rate", 1e-4, "contradicts a key of params.yaml; state train.learning_rate instead"),
        ("max_length", 128, "state pack.max_length instead"),
        ("output_dir", "/tmp/x", "checkpoints lie in .state/"),
        ("ignore_data_skip", True, "would not continue to the same weights"),
        ("hub_always_push", True, "a training uploads nothing"),
        ("dataloader_num_workers", "two", "dataloader_num_workers='two': give a whole number"),
        ("dataloader_num_workers", 1.5, "dataloader_num_workers=1.5: give a whole number"),
        ("log_entropy", "yes", "log_entropy='yes': give True or False"),
        ("accelerator_config", [1], "accelerator_config=[1]: give text or a dict"),
    ],
)
def test_an_entry_that_cannot_be_set_is_refused_with_the_way_out(
    values: dict[str, Any], name: str, value: Any, said: str
) -> None:
    values["train"]["arguments"] = {name: value}
    with pytest.raises(ParamsError) as error:
        check_params(values)
    assert "train.arguments" in str(error.value)
    assert name in str(error.value)
    assert said in str(error.value)


def test_all_problems_of_the_entries_are_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"output_dir can't be set.*; seed contradicts") as error:
        check_arguments({"output_dir": "x", "log_entropy": True, "seed": 3})
    assert "log_entropy" not in str(error.value)


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    checked = check_arguments({"eval_delay": "1e-1", "dataloader_num_workers": 2.0, "tf32": None})
    assert checked == {"eval_delay": 0.1, "dataloader_num_workers": 2, "tf32": None}
    assert type(checked["dataloader_num_workers"]) is int


def test_every_key_that_a_message_names_exists(values: dict[str, Any]) -> None:
    for option, key in KEYS.items():
        section: Any = values
        for part in key.removesuffix("[].columns").split("."):
            assert part in section, (option, key)
            section = section[part]


def test_every_option_has_one_entry() -> None:
    for option in training_options().values():
        assert option.key is None or option.refusal is None, option.name
