"""Options are checked by their types when they are given, and misspelled ones are named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

import sft
from sft.config import ModelConfig, SFTConfig


def config(**options: Any) -> SFTConfig:
    return SFTConfig(output_dir="out", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "yes"}, "packing='yes': give True or False"),
        ({"packing": 2}, "packing=2: give True or False"),
        ({"max_length": 2.5}, "max_length=2.5: give a whole number"),
        ({"max_length": True}, "max_length=True: give a whole number"),
        ({"max_length": [512]}, r"max_length=\[512\]: give a whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast': give a number"),
        ({"eos_token": 3}, "eos_token=3: give text"),
        ({"bf16": "maybe"}, "bf16='maybe': give True or False"),
        ({"dataset_text_field": ["a", "b"]}, r"dataset_text_field=\['a', 'b'\]: give text"),
        ({"optim": 3}, "optim=3: give text"),
        ({"run_name": "x" * 100 + "y", "packing": "z" * 10_000}, r"packing='z+\.\.\.z+': give True or False"),
    ],
)
def test_a_value_of_another_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_value_that_has_one_meaning_is_converted() -> None:
    made = config(
        packing=1, max_length="512", learning_rate="1e-4", logging_steps=8, num_train_epochs=2, eval_steps=4.0
    )
    assert (made.packing, made.max_length, made.learning_rate, made.eval_steps) == (True, 512, 1e-4, 4.0)
    assert made.packing is True
    assert config(per_device_train_batch_size=4.0).per_device_train_batch_size == 4
    assert config(max_length=None, dataset_num_proc=None).max_length is None


def test_an_option_that_is_set_by_hand_is_checked_by_validate() -> None:
    made = config()
    made.packing = "yes"
    with pytest.raises(ValueError, match="packing='yes': give True or False"):
        made.validate()


def test_a_misspelled_option_is_named_with_the_most_similar_one() -> None:
    with pytest.raises(TypeError, match=r"^SFTConfig has no option 'max_lenght': did you mean max_length\?$"):
        config(max_lenght=512)
    with pytest.raises(TypeError, match=r"^SFTConfig has no option 'qqq', see help\(SFTConfig\)$"):
        config(qqq=1)
    with pytest.raises(TypeError, match=r"ModelConfig has no option 'lora_rr': did you mean lora_r\?"):
        ModelConfig(lora_rr=8)


def test_options_of_a_subclass_are_accepted() -> None:
    @dataclass
    class OwnConfig(SFTConfig):
        own: int = 1

    assert OwnConfig(output_dir="out", use_cpu=True, own=2, packing=True).own == 2


def test_importing_the_options_prints_nothing() -> None:
    code = "import sft; from sft import SFTConfig, SFTTrainer; print(sft.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert (done.stdout, done.stderr) == (f"{sft.__version__}\n", "")
