"""A training, merge or evaluation that can't fit is found by the shape of the model, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.params.schema import Params
from stages.preflight.checkpoint import read_outline
from stages.preflight.findings import Problem
from stages.preflight.machine import Machine, check_machine
from stages.tools import check
from tests.stages.data_root import ROWS, DataRoot
from tests.stages.tiny_run import tiny_params

GB = 10**9
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
FULL = {"method": "full"}
BF16 = {"model": {"dtype": "bfloat16"}, "merge": {"dtype": "bfloat16"}}


def gpu(size: int, **more: Any) -> Machine:
    return Machine(8, 512 * GB, (size * GB,), "cuda", (9, 0), **more)


def params_of(**overrides: dict[str, Any]) -> Params:
    return tiny_params(**{"quantize": {"method": "none"}, "pack": {"max_length": 512}, **overrides})


def found(root: Path, machine: Machine, params: Params, config: dict[str, Any] = LLAMA_8B) -> list[Problem]:
    folder = root / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return list(check_machine(params, root, None, machine, folder))


def test_full_training_that_does_not_fit_is_an_error_with_the_values_that_need_less(tmp_path: Path) -> None:
    params = params_of(**{**BF16, "train": {"method": "full"}})
    assert found(tmp_path, gpu(141), params) == []
    ((key, text, is_error),) = found(tmp_path, gpu(60), params)
    assert (key, is_error) == ("train.method", True)
    # 8.03e9 weights: 2 bytes each, as many for gradients, 4 for AdamW's moments
    assert text.startswith("the training needs at least 64.2 GB, about 69.8 GB (weights 16.1, gradients 16.1, ")
    assert ", and the GPU has 60.0 GB; ways out: train.method: qlora (" in text
    assert "train.method: lora (" in text


def test_only_what_is_certain_is_an_error(tmp_path: Path) -> None:
    lora = params_of(**{**BF16, "train": {"method": "lora"}, "pack": {"max_length": 4096}})
    ((key, text, is_error),) = found(tmp_path, gpu(24), lora)
    assert (key, is_error) == ("train.gradient_checkpointing", False)  # activations, of which kernels keep fewer
    assert "; ways out: train.gradient_checkpointing: true (20." in text
    # paged and factored states, frozen parameters and files of accelerate need less than the estimate
    assert all(problem.is_error for problem in found(tmp_path, gpu(60), params_of(**{**BF16, "train": FULL})))
    for train in (
        {**FULL, "optim": "paged_adamw_8bit"},
        {**FULL, "parameter_groups": [{"pattern": "embed", "frozen": True}]},
    ):
        problems = found(tmp_path, gpu(40), params_of(**{**BF16, "train": train}))
        assert [(problem.key, problem.is_error) for problem in problems] == [("train.method", False)]


def test_a_need_within_fifteen_percent_is_a_warning(tmp_path: Path) -> None:
    params = params_of(**{**BF16, "train": {"method": "full"}})  # 69.8 GB
    assert found(tmp_path, gpu(83), params) == []
    ((_, text, is_error),) = found(tmp_path, gpu(81), params)
    assert not is_error
    assert text.startswith("the training needs about 69.8 GB (")


def test_processes_share_main_memory_and_each_has_a_gpu(tmp_path: Path) -> None:
    launch = params_of().train.launch.model_dump()
    params = params_of(**{**BF16, "train": {"method": "lora", "launch": {**launch, "processes": 2}}})
    assert found(tmp_path, Machine(8, 64 * GB, (40 * GB, 40 * GB), "cuda", (9, 0)), params) == []
    problems = found(tmp_path, Machine(8, 30 * GB), params)
    assert problems[0].text.startswith("the training needs at least 16.2 GB")
    assert "each of 2 processes of this machine has 15.0 GB" in problems[0].text
    sharded = params_of(**{**BF16, "train": {"method": "full", "launch": {**launch, "processes": 2}}})
    ((key, text, _),) = found(tmp_path, Machine(8, 512 * GB, (60 * GB, 60 * GB), "cuda", (9, 0)), sharded)
    assert "train.launch.engine: fsdp2 (37.6 GB)" in text
    assert key == "train.method"


def test_swap_turns_the_error_into_a_warning(tmp_path: Path) -> None:
    params = params_of(**{**BF16, "train": {"method": "lora"}})
    assert {problem.is_error for problem in found(tmp_path, Machine(8, 10 * GB), params)} == {True}
    assert {problem.is_error for problem in found(tmp_path, Machine(8, 10 * GB, swap=30 * GB), params)} == {False}


def test_evaluation_of_a_wide_merged_model_after_qlora_is_an_error(tmp_path: Path) -> None:
    params = params_of(model={"dtype": "bfloat16"}, merge={"dtype": "float32"}, train={"method": "qlora"})
    ((key, text, is_error),) = found(tmp_path, gpu(24), params)
    assert (key, is_error) == ("merge.dtype", True)
    assert text == (
        "the evaluation of the merged model needs at least 32.1 GB, about 33.6 GB, and the GPU has 24.0 GB; ways out: "
        "merge.dtype: bfloat16 (17.6 GB)"
    )


def test_a_merge_holds_the_largest_file(tmp_path: Path) -> None:
    """Headers of weight files are enough; their weights are never read."""
    write_header(tmp_path / "model" / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": [40_000, 100_000]})
    (tmp_path / "model" / "config.json").write_text('{"model_type": "other"}')
    outline = read_outline(tmp_path / "model")
    assert outline is not None
    machine = Machine(8, 12 * GB, (80 * GB,), "cuda", (9, 0))
    params = params_of(model={"dtype": "bfloat16"}, merge={"dtype": "float32"}, train={"method": "lora"})
    problems = list(check_machine(params, tmp_path, outline, machine, tmp_path / "model"))
    assert ("merge.dtype", True) in [(problem.key, problem.is_error) for problem in problems]
    text = next(problem.text for problem in problems if problem.text.startswith("the merge"))
    assert text == (
        "the merge needs at least 16.0 GB, about 17.5 GB, and this machine has 12.0 GB; ways out: "
        "merge.dtype: bfloat16 (9.5 GB)"
    )


def write_header(file: Path, shapes: dict[str, list[int]]) -> None:
    """Write the header of a safetensors file, without its weights."""
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}).encode()
    file.parent.mkdir()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_model_of_the_hub_is_known_by_its_name_and_any_other_is_not_judged(tmp_path: Path) -> None:
    for name, keys in (("meta-llama/Llama-3.3-70B-Instruct", ["train.method", "merge.dtype"]), ("org/unknown", [])):
        params = params_of(model={"name_or_path": name, "dtype": "bfloat16"}, train={"method": "full"})
        assert [problem.key for problem in check_machine(params, tmp_path, None, gpu(24))] == keys


def test_check_says_it_with_the_line_before_anything_runs(tmp_path: Path) -> None:
    root = DataRoot(tmp_path)
    root.write("train.jsonl", ROWS)
    folder = root.paths.root / "models" / "huge"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": 32_000}))
    params = root.params()
    params = params.model_copy(
        update={"model": params.model.model_copy(update={"name_or_path": "models/huge", "dtype": "bfloat16"})}
    )
    root.paths.params.write_text("train:\n  method: lora\n  gradient_checkpointing: false\n")
    with pytest.raises(check.CheckFailed, match=r"params\.yaml:2: train\.method: the training needs at least 1\d{4}\."):
        check.run(params, root.paths)
