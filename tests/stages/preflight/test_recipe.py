"""Advice on a recipe: nothing on the shipped one, one sentence on each thing that is far from known good ones."""

from __future__ import annotations

from typing import Any

import pytest

from stages.params.schema import TrainSection, load_params
from stages.preflight.recipe import check_recipe, known_good_rate
from tests.stages.data_root import ROOT

SMOLLM = {"hidden_size": 576}


def section(**changes: Any) -> TrainSection:
    return TrainSection.model_validate(load_params(ROOT / "params.yaml").train.model_dump() | changes)


def test_lora_has_ten_times_the_rate_of_full_training_and_a_wider_model_a_lower_one() -> None:
    assert known_good_rate(2000, uses_lora=True) == 5e-4
    assert known_good_rate(2000, uses_lora=False) == 5e-5
    assert known_good_rate(4000, uses_lora=True) == pytest.approx(5e-4 / 2**0.781)


def test_the_shipped_recipe_gets_no_advice() -> None:
    assert list(check_recipe(section(), SMOLLM)) == []


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"learning_rate": 2e-5}, "train.learning_rate", "2e-05 is far below 0.001, a good rate of LoRA"),
        ({"method": "full", "learning_rate": 1.5e-3}, "train.learning_rate", "far above 0.0001, a good rate of full"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "train.lora_target_modules", "state all-linear"),
        ({"gradient_accumulation_steps": 256}, "train.per_device_train_batch_size", "256 rows per update"),
    ],
)
def test_what_is_far_from_known_good_is_said_with_its_key(changes: dict[str, Any], key: str, said: str) -> None:
    (problem,) = check_recipe(section(**changes), SMOLLM)
    assert problem.key == key
    assert said in problem.text
    assert not problem.is_error


def test_a_width_outside_the_fit_gets_no_advice_on_the_rate() -> None:
    assert list(check_recipe(section(learning_rate=1.0), {"hidden_size": 16})) == []
