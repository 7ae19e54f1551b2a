"""`python -m stages estimate` agrees with the training that follows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stages import train
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.params.schema import Params
from stages.tools import estimate
from tests.stages.tiny_run import tiny_params, write_tiny_run

SHORT = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "eval_steps": 2}


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Params, Paths]:
    return tiny_params(train=SHORT), write_tiny_run(tmp_path)


def test_steps_tokens_and_parameters_are_those_of_the_training(
    tiny: tuple[Params, Paths], capsys: pytest.CaptureFixture[str]
) -> None:
    params, paths = tiny
    before = sorted(paths.root.rglob("*"))
    estimate.run(params, paths)
    assert sorted(paths.root.rglob("*")) == before
    printed = capsys.readouterr().out
    train.run(params, paths)
    found = read_json(paths.metrics("train"))
    assert f"steps       {found['steps']} updates, 3.00 epochs, {found['tokens_seen']:,} tokens" in printed
    assert f"{found['trainable_parameters']:,} trained of {found['parameters']:,}" in printed
    assert "2 evaluations" in printed


def test_peak_holds_all_that_is_listed(tiny: tuple[Params, Paths], capsys: pytest.CaptureFixture[str]) -> None:
    estimate.run(*tiny)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
    peak, parts = line.removeprefix("memory").split(" GB at its peak: ")
    sizes = [float(part.rpartition(" ")[2]) for part in parts.split(", ")]
    assert len(sizes) >= 3
    assert math.isclose(float(peak), sum(sizes), abs_tol=0.05)


def test_json_has_bytes_and_seconds_on_a_clean_output(
    tiny: tuple[Params, Paths], capsys: pytest.CaptureFixture[str]
) -> None:
    estimate.run(*tiny, as_json=True)
    value = json.loads(capsys.readouterr().out)
    parts = value["memory_bytes"]
    assert parts.pop("peak") == sum(parts.values())
    assert value["seconds"]["training"] > 0
    assert value["evaluations"] == 2


def test_without_packed_rows_the_message_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type `sft pack` first"):
        estimate.run(tiny_params(), Paths(tmp_path))


@pytest.mark.parametrize(("seconds", "printed"), [(9.4, "9 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_durations_are_formatted(seconds: float, printed: str) -> None:
    assert estimate.duration(seconds) == printed
