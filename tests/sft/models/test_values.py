"""Weights that are no finite numbers, and configurations of adapters that never end, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sft.models.checkpoint import CheckpointError, weight_files
from sft.models.loading import load_model
from sft.models.saved_adapters import check_adapter_folder, load_adapter
from sft.models.values import is_finite
from sft.untrusted import patterns
from tests.tiny import tiny_model

DOWN = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_weights(file: Path, name: str, value: torch.Tensor) -> None:
    save_file({**load_file(file), name: value}, file, metadata={"format": "pt"})


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_with_a_value_that_is_not_finite_is_refused_by_file_and_name(
    tmp_path: Path, value: float, dtype: str
) -> None:
    tiny_model().save_pretrained(tmp_path)
    weight = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    weight[3, 2] = value
    change_weights(tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight", weight)
    with pytest.raises(CheckpointError) as raised:
        load_model(tmp_path, dtype=dtype)
    assert str(raised.value).startswith(
        f"The weight model.layers.1.mlp.up_proj.weight in {tmp_path}/model.safetensors has values that are NaN or "
        "infinite."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_values_of_every_type_are_looked_at(dtype: torch.dtype) -> None:
    values = torch.ones(4, 3).to(dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    values[2, 1] = float("nan")
    assert not is_finite(values)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((2, 16), 3, dtype=torch.int64), "is of the type int64"),
        (torch.full((2, 16), True), "is of the type bool"),
        (torch.full((2, 16), float("nan")), "has values that are NaN or infinite"),
        (torch.full((2, 16), float("inf"), dtype=torch.bfloat16), "has values that are NaN or infinite"),
    ],
)
def test_weights_of_an_adapter_that_are_no_finite_numbers_are_refused(
    adapter: Path, value: torch.Tensor, said: str
) -> None:
    change_weights(adapter / "adapter_model.safetensors", DOWN, value)
    with pytest.raises(CheckpointError) as raised:
        load_adapter(tiny_model(), adapter)
    assert f"The weight {DOWN} in {adapter}/adapter_model.safetensors {said}" in str(raised.value)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r"(.*.*)*.*(_proj_*)+x"},
        {"exclude_modules": r"(\w+\.*)+$!"},
        {"rank_pattern": {r"(\w+\.*)+!": 2}},
        {"alpha_pattern": {r"(\w+\.*)+!": 2}},
    ],
)
def test_expressions_of_an_adapter_that_backtrack_without_end_are_refused(
    adapter: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    change_config(adapter, **values)
    with pytest.raises(CheckpointError, match=r"matching it takes more than 0\.5 s"):
        load_adapter(tiny_model(), adapter)


def test_an_expression_that_is_none_is_refused(adapter: Path) -> None:
    change_config(adapter, target_modules="(q_proj")
    with pytest.raises(CheckpointError, match=r"target_modules is '\(q_proj' in its adapter_config\.json, and missing"):
        load_adapter(tiny_model(), adapter)


def test_a_rank_that_would_fill_the_memory_is_refused(adapter: Path) -> None:
    change_config(adapter, r=10**9)
    with pytest.raises(CheckpointError, match="states the rank 1000000000, and no weight in its file has more than"):
        load_adapter(tiny_model(), adapter)


@pytest.mark.parametrize("value", [1.5, "q_proj"])
def test_a_pattern_option_that_is_no_map_is_refused(adapter: Path, value: object) -> None:
    change_config(adapter, rank_pattern=value)
    with pytest.raises(CheckpointError, match=f"rank_pattern is {value!r} in its adapter_config.json, and must map"):
        load_adapter(tiny_model(), adapter)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '"x"'], ids=["deep", "open", "list", "text"])
def test_a_damaged_configuration_of_an_adapter_is_a_message(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not"):
        check_adapter_folder(adapter)


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names '\.\./b\.safetensors', which is not a file in its folder"):
        weight_files(tmp_path)


def test_an_ordinary_adapter_is_loaded(adapter: Path) -> None:
    assert load_adapter(tiny_model(), adapter).peft_config["default"].r == 2
