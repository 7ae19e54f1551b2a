"""A loss that stands still, and parameters that stay untrained, are recorded."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stages.training.effect import effect_record, flat_loss


def evaluated(*losses: float) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate(losses, start=1)]


def trained(*losses: float) -> list[dict[str, Any]]:
    return [{"step": number, "loss": loss} for number, loss in enumerate(losses, start=1)]


def test_held_out_losses_within_a_thousandth_have_not_moved() -> None:
    assert flat_loss(evaluated(2.0, 2.0015, 2.001)) == {
        "figure": "eval_loss",
        "first_step": 10,
        "last_step": 30,
        "lowest": 2.0,
        "highest": 2.0015,
        "sentence": "The held-out loss stays between 2.0000 and 2.0015 from step 10 to 30.",
    }
    assert flat_loss(evaluated(2.0, 1.99)) is None
    assert flat_loss(evaluated(2.0, math.nan)) is None


@pytest.mark.parametrize(
    ("losses", "is_flat"),
    [
        ([3.0 - 0.1 * number for number in range(10)], False),
        ([3.0, 2.0] * 6, True),
        ([2.5] * 12, True),
        ([3.0, 2.0] * 4, False),  # too few points
    ],
)
def test_with_one_evaluation_a_trend_of_the_training_loss_is_looked_for(losses: list[float], is_flat: bool) -> None:
    found = flat_loss([*trained(*losses), *evaluated(2.0)])
    assert (found is not None) == is_flat
    assert found is None or found["figure"] == "loss"


def test_findings_are_recorded_with_their_step() -> None:
    row = {"modules": "layers.*.mlp", "count": 3, "first": "layers.0.mlp", "problem": "no gradient"}
    history = [{"step": 5, "untrained": [row]}, *evaluated(2.0, 1.0)]
    assert effect_record(history) == {"untrained": [{"step": 5, **row}], "flat_loss": None}
