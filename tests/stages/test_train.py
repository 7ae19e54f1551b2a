"""The stage `train`: params reach the library, checkpoints are found again only when they belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages import train
from stages.artifacts import write_json
from stages.checkpoints import TrainingState, is_whole
from stages.params import Params, TrainSection, load_params
from stages.paths import Paths
from tests.stages.data_root import ROOT


def params(**section: Any) -> Params:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["train"] |= section
    return Params.model_validate(values)


# Where a key of the section ends up under another name or in another object.
ELSEWHERE = {"method", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "warmup_ratio", "launch"}


def test_every_key_of_the_section_reaches_the_trainer(tmp_path: Path) -> None:
    section = params(weight_decay=0.25, neftune_noise_alpha=5.0, loss_type="dft", max_grad_norm=0.5, seed=7).train
    config = train.make_sft_config(section, tmp_path)
    for key in set(TrainSection.model_fields) - ELSEWHERE:
        assert getattr(config, key) == getattr(section, key), key
    assert config.warmup_steps == section.warmup_ratio


@pytest.mark.parametrize(
    ("method", "use_peft", "four_bit"), [("lora", True, False), ("qlora", True, True), ("full", False, False)]
)
def test_method_decides_adapter_and_base(method: str, use_peft: bool, four_bit: bool) -> None:
    config = train.make_model_config(params(method=method, lora_r=4, lora_alpha=6, lora_dropout=0.125))
    assert (config.use_peft, config.load_in_4bit) == (use_peft, four_bit)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.125)


def test_curve_has_one_row_a_step_and_leaves_out_wall_times() -> None:
    history = [
        {"step": 5, "loss": 2.0, "learning_rate": 0.1, "train_runtime": 9.0},
        {"step": 10, "loss": 1.0, "learning_rate": 0.05},
        {"step": 10, "eval_loss": 1.5, "eval_runtime": 3.0},
        {"step": 10, "train_loss": 1.5},
    ]
    lines = train.curve_csv(history).splitlines()
    assert lines[0].startswith("step,loss,eval_loss,learning_rate,grad_norm")
    assert lines[1:] == ["5,2.0,,0.1,,,,", "10,1.0,1.5,0.05,,,,"]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    write_json(paths.out("load", "base_model.json"), {"digest": "a"})
    write_json(paths.out("pack", "train", "data.json"), [1])
    return paths


def checkpoint(state: TrainingState, step: int, *, whole: bool = True) -> Path:
    folder = state.folder / f"checkpoint-{step}"
    folder.mkdir()
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).touch()
    text = json.dumps({"global_step": step})
    (folder / "trainer_state.json").write_text(text if whole else text[:-3])
    return folder


def test_newest_whole_checkpoint_is_resumed_and_half_written_ones_are_removed(paths: Paths) -> None:
    state = TrainingState.open(params(), paths)
    checkpoint(state, 20)
    newest = checkpoint(state, 100)
    broken = checkpoint(state, 120, whole=False)
    assert not is_whole(broken)
    assert state.last_checkpoint() == newest
    assert not broken.exists()


@pytest.mark.parametrize("what", ["rate", "rows", "base"])
def test_other_params_rows_or_base_do_not_see_the_checkpoints(paths: Paths, what: str) -> None:
    checkpoint(TrainingState.open(params(), paths), 20)
    if what == "rows":
        write_json(paths.out("pack", "train", "data.json"), [2])
    if what == "base":
        write_json(paths.out("load", "base_model.json"), {"digest": "b"})
    changed = params(learning_rate=2e-3) if what == "rate" else params()
    assert TrainingState.open(changed, paths).last_checkpoint() is None


def test_a_finished_training_is_cleared_away_by_the_next_one_not_by_itself(paths: Paths) -> None:
    first = TrainingState.open(params(), paths)
    checkpoint(first, 20)
    first.mark_finished()
    assert TrainingState.open(params(), paths).last_checkpoint() is not None
    TrainingState.open(params(seed=1), paths)
    assert not first.folder.exists()


def test_an_unfinished_training_survives_another_one(paths: Paths) -> None:
    first = TrainingState.open(params(), paths)
    checkpoint(first, 20)
    TrainingState.open(params(seed=1), paths)
    assert TrainingState.open(params(), paths).last_checkpoint() is not None
