"""The stage `train`: params reach the library, and the curve has one row per step."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from sft.config import SFTConfig
from stages.params.schema import Params, TrainSection, load_params
from stages.training.adapter import make_model_config
from stages.training.curve import curve_csv
from stages.training.setup import NOT_SFT_OPTIONS, make_sft_config
from tests.stages.data_root import ROOT
from tests.stages.training_root import make_training_root, run_stage


def params(**section: Any) -> Params:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["train"] |= section
    return Params.model_validate(values)


def test_every_key_of_the_section_reaches_the_trainer(tmp_path: Path) -> None:
    section = params(weight_decay=0.25, neftune_noise_alpha=5.0, loss_type="dft", max_grad_norm=0.5, seed=7).train
    config = make_sft_config(section, tmp_path)
    for key in set(TrainSection.model_fields) - NOT_SFT_OPTIONS:
        assert getattr(config, key) == getattr(section, key), key
    assert config.warmup_steps == section.warmup_ratio
    assert make_sft_config(params(warmup_ratio=1.0).train, tmp_path).get_warmup_steps(100) == 100


def test_options_by_name_reach_the_trainer_and_its_own_check(tmp_path: Path) -> None:
    by_name = {"dataloader_num_workers": 2, "log_entropy": True, "accelerator_config": {"non_blocking": True}}
    config = make_sft_config(params(arguments=by_name).train, tmp_path)
    assert (config.dataloader_num_workers, config.log_entropy) == (2, True)
    assert config.accelerator_config.non_blocking
    with pytest.raises(ValueError, match=r"params\.yaml, train: .*prefetch_factor"):
        make_sft_config(params(arguments={"dataloader_prefetch_factor": 2}).train, tmp_path)


def test_every_key_of_the_section_is_an_option_of_the_library_or_read_elsewhere() -> None:
    assert set(TrainSection.model_fields) - NOT_SFT_OPTIONS <= {field.name for field in fields(SFTConfig)}
    assert set(TrainSection.model_fields) >= NOT_SFT_OPTIONS


@pytest.mark.parametrize(("value", "steps"), [(0.25, 8), (7, 7), (20.0, 20)])
def test_evaluations_come_every_so_many_steps_or_at_a_fraction_of_them(
    value: float, steps: int, tmp_path: Path
) -> None:
    state = TrainerState()
    state.compute_steps(make_sft_config(params(eval_steps=value).train, tmp_path), max_steps=30)
    assert state.eval_steps == steps


@pytest.mark.parametrize("value", [1.5, 0, -0.1])
def test_number_of_steps_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="eval_steps"):
        params(eval_steps=value)


def test_shipped_params_differ_from_the_defaults_of_the_library_in_these_options(tmp_path: Path) -> None:
    config = make_sft_config(params().train, tmp_path).to_dict()
    defaults = SFTConfig(output_dir=str(tmp_path)).to_dict()
    assert {name: value for name, value in config.items() if value != defaults[name]} == {
        "adam_beta2": 0.99,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
        "do_eval": True,
        "eval_steps": 0.1,
        "eval_strategy": "steps",
        "learning_rate": 0.002,
        "logging_nan_inf_filter": False,
        "logging_steps": 5,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1.0,
        "on_bad_loss": "stop",
        "per_device_eval_batch_size": 1,
        "per_device_train_batch_size": 1,
        "save_steps": 20,
        "save_total_limit": 2,
        "seed": 0,
        "warmup_steps": 0.05,
    }
    equal_to_defaults = {
        "bad_loss_factor": None,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "loss_type": "nll",
        "max_grad_norm": 1.0,
        "max_steps": -1,
        "neftune_noise_alpha": None,
        "output_dir": str(tmp_path),
        "padding_free": None,  # rows with `seq_lengths` are joined, others as the model allows
        "report_to": [],
        "save_strategy": "steps",
        "use_liger_kernel": False,
        "weight_decay": 0.0,
    }
    assert {name: config[name] for name in equal_to_defaults} == equal_to_defaults


@pytest.mark.parametrize(
    ("method", "use_peft", "four_bit"), [("lora", True, False), ("qlora", True, True), ("full", False, False)]
)
def test_method_decides_adapter_and_base(method: str, use_peft: bool, four_bit: bool) -> None:
    config = make_model_config(params(method=method, lora_r=4, lora_alpha=6, lora_dropout=0.125))
    assert (config.use_peft, config.load_in_4bit) == (use_peft, four_bit)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.125)


def test_curve_has_one_row_per_step_and_no_wall_times() -> None:
    history = [
        {"step": 5, "loss": 2.0, "learning_rate": 0.1, "train_runtime": 9.0},
        {"step": 10, "loss": 1.0, "learning_rate": 0.05},
        {"step": 10, "eval_loss": 1.5, "eval_runtime": 3.0},
        {"step": 10, "train_loss": 1.5},
    ]
    lines = curve_csv(history).splitlines()
    assert lines[0].startswith("step,loss,eval_loss,learning_rate,grad_norm")
    assert lines[1:] == ["5,2.0,,0.1,,,,", "10,1.0,1.5,0.05,,,,"]


def test_curve_has_columns_of_the_experts_loss_only_where_there_is_one() -> None:
    history = [{"step": 5, "loss": 2.0, "aux_loss": 0.5}, {"step": 5, "eval_loss": 1.5, "eval_aux_loss": 0.25}]
    lines = curve_csv(history).splitlines()
    assert lines[0].endswith(",num_input_tokens_seen,aux_loss,eval_aux_loss")
    assert lines[1] == "5,2.0,1.5,,,,,,0.5,0.25"
    assert "aux_loss" not in curve_csv(history[:0])


def test_parameters_and_dropout_exclude_each_other() -> None:
    assert make_model_config(params(lora_target_parameters=["experts.down_proj"])).lora_target_parameters == [
        "experts.down_proj"
    ]
    with pytest.raises(ValueError, match=r"lora_dropout 0\.1 can't be used with lora_target_parameters"):
        params(lora_target_parameters=["experts.down_proj"], lora_dropout=0.1)


@pytest.mark.slow
def test_equal_trainings_write_equal_files_whatever_the_order_of_sets(tmp_path: Path) -> None:
    paths = make_training_root(tmp_path / "root", max_steps=2)
    written = []
    for seed in ("1", "2", "3"):
        shutil.rmtree(paths.state, ignore_errors=True)
        run_stage(paths, PYTHONHASHSEED=seed)
        files = [path for path in sorted(paths.out("train").rglob("*")) if path.is_file()]
        written.append({path.relative_to(paths.root).as_posix(): path.read_bytes() for path in files})
    assert "outs/train/model/adapter_config.json" in written[0]
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []
    assert written[0] == written[1] == written[2]
