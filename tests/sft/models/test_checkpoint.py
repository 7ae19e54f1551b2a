"""The weight files of a checkpoint folder: one file, several with an index, or several without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.export.gptq_format import open_tensors, weights_size_bytes
from sft.export.quantization import check_weights_finite
from sft.models.checkpoint import INDEX, CheckpointError, weight_files
from tests.tiny import tiny_model


def test_sharded_checkpoint_has_the_files_of_its_index_and_the_weights_of_the_single_file(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    model = tiny_model()
    model.save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert [file.name for file in weight_files(single)] == ["model.safetensors"]
    files = weight_files(sharded)
    assert len(files) > 1
    assert files == sorted(sharded.glob("*.safetensors"))
    assert weights_size_bytes(sharded) == sum(file.stat().st_size for file in files)
    expected = load_file(single / "model.safetensors")
    with open_tensors(sharded) as found:
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name].get_tensor(name), tensor)
    check_weights_finite(sharded)
    # a file that the index does not name is not part of the checkpoint
    save_file({"stray": torch.full((2,), torch.nan)}, sharded / "stray.safetensors")
    assert weight_files(sharded) == files
    check_weights_finite(sharded)


def test_files_without_an_index_are_all_weight_files(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


def test_folder_without_weight_files_is_refused_before_a_quantization(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    with pytest.raises(ValueError, match=r"holds no \.safetensors file: give a plain merged checkpoint folder"):
        check_weights_finite(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"weights": {}})])
def test_index_that_is_damaged_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{INDEX} can't be read"):
        weight_files(tmp_path)
