"""What a machine can't do is found before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.preflight.machine import Machine, check_machine
from tests.stages.tiny_run import tiny_params

CPU = Machine(num_cores=2, memory=10**10)
TURING = Machine(2, 10**10, gpus=(10**10,), device="cuda", capability=(7, 5))
AMPERE = Machine(2, 10**10, gpus=(10**10,), device="cuda", capability=(8, 0))


def problems(machine: Machine, root: Path, **overrides: dict[str, Any]) -> list[tuple[str, str, bool]]:
    params = tiny_params(quantize={"method": "none"}, **overrides)
    return [tuple(problem) for problem in check_machine(params, root, None, machine)]


def test_products_in_bf16_on_an_old_gpu_are_a_warning(tmp_path: Path) -> None:
    ((key, text, is_error),) = problems(TURING, tmp_path, train={"mixed_precision": "bf16"})
    assert (key, is_error) == ("train.mixed_precision", False)
    assert "compute capability 7.5; products in bf16, which GPUs have from 8.0 on, are emulated" in text
    assert [found[0] for found in problems(TURING, tmp_path, model={"dtype": "bfloat16"})] == ["model.dtype"]
    for machine in (AMPERE, CPU):
        assert problems(machine, tmp_path, train={"mixed_precision": "bf16"}) == []


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    train = {"mixed_precision": "fp16", "on_bad_loss": None}
    assert problems(CPU, tmp_path, train=train) == [
        ("train.mixed_precision", "fp16 needs a GPU, and this machine has none; use bf16", True)
    ]
    assert problems(TURING, tmp_path, train=train) == []


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("galore_adamw", "optim='galore_adamw' needs the package galore_torch: pip install galore-torch"),
        ("adamw_bnb_8bit", ""),
    ],
)
def test_an_optimizer_whose_package_is_missing_is_refused(tmp_path: Path, optim: str, message: str) -> None:
    found = problems(CPU, tmp_path, train={"optim": optim})
    assert found == ([("train.optim", message, True)] if message else [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.yaml: no such file, and not one of the engines ddp, fsdp2, deepspeed_zero2, deepspeed_zero3"),
        ("distributed_type: 'NO'\n", "mine.yaml: distributed_type is NO, which does not start several processes"),
        ("distributed_type: FSDP\nnum_processes: 8\n", "mine.yaml: num_processes is 8, but train.launch.processes 2"),
        ("distributed_type: FSDP\n", ""),
    ],
)
def test_a_configuration_of_accelerate_is_checked(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    launch = tiny_params().train.launch.model_dump() | {"engine": "mine.yaml", "processes": 2}
    found = problems(CPU, tmp_path, train={"launch": launch})
    assert [(key, is_error) for key, _, is_error in found] == [("train.launch.engine", True)] * bool(message)
    assert all(text.startswith(message) for _, text, _ in found)
