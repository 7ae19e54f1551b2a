"""Rows and layers that processes would divide among themselves are refused by name; divided weights are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset

from sft.config import SFTConfig
from sft.train.processes import check_parallelism
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

ROWS = Dataset.from_list([{"prompt": "1 and 1?", "completion": " 2."}])
REFUSALS = {
    "cp_size": "context parallelism divides each row among processes",
    "sp_size": r"sequence parallelism \(ALST/Ulysses\) divides each row among processes",
    "tp_size": "tensor parallelism divides each layer among processes",
}


def config(**options: Any) -> SFTConfig:
    return SFTConfig(output_dir="out", use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize("name", REFUSALS)
def test_rows_and_layers_in_parts_are_refused_before_the_model_is_loaded(name: str, tmp_path: Path) -> None:
    options = config(parallelism_config=ParallelismConfig(**{name: 2}))
    message = rf"parallelism_config has {name}=2: {REFUSALS[name]}, .* Set it to 1.* with FSDP2"
    with pytest.raises(ValueError, match=message):
        SFTTrainer(str(tmp_path / "no model"), args=options, train_dataset=ROWS)


@pytest.mark.parametrize("name", REFUSALS)
def test_the_environment_of_a_launcher_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "4")
    check_parallelism(config())  # accelerate does not read it without the next variable
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ValueError, match=rf"environment \(PARALLELISM_CONFIG_\.\.\.\) has {name}=4: {REFUSALS[name]}"):
        check_parallelism(config())


def test_a_size_that_the_argument_leaves_to_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(ValueError, match="parallelism_config has cp_size=2"):
        check_parallelism(config(parallelism_config=ParallelismConfig(dp_shard_size=2)))


def test_the_accelerator_of_a_script_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    options = config()
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(cp_size=2))
    with pytest.raises(ValueError, match="the Accelerator that the script made has cp_size=2"):
        check_parallelism(options)


def test_tensor_parallelism_of_deepspeed_is_refused() -> None:
    options = config()
    options.hf_deepspeed_config = SimpleNamespace(config={"tensor_parallel": {"autotp_size": 2}})
    with pytest.raises(ValueError, match=r"DeepSpeed configuration has tensor_parallel\.autotp_size=2: tensor"):
        check_parallelism(options)


def test_sizes_that_are_not_a_parallelism_config_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallelism_config=\{'cp_size': 2\} is not an accelerate.ParallelismConfig"):
        check_parallelism(config(parallelism_config={"cp_size": 2}))


@pytest.mark.parametrize("sizes", [{}, {"dp_shard_size": 2}, {"dp_shard_size": 2, "dp_replicate_size": 2}])
def test_weights_may_be_divided_and_copied(sizes: dict[str, int]) -> None:
    check_parallelism(config(parallelism_config=ParallelismConfig(**sizes)))


@pytest.mark.parametrize(("name", "size"), [("_tp_size", 2), ("_fsdp_size", 4)])
def test_a_model_that_was_divided_when_it_was_loaded_is_refused(name: str, size: int, tmp_path: Path) -> None:
    model = tiny_model()
    setattr(model, name, size)
    with pytest.raises(ValueError, match=rf"divided among processes when it was loaded .*{name[1:]}={size}.* FSDP2"):
        SFTTrainer(model, args=quiet_config(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer())
