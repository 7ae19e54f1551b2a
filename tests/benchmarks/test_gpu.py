"""The GPU measurements at tiny shapes on the CPU, and their counts on paper."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compare import moved
from benchmarks.gpu.numerics import CASES, compare
from benchmarks.gpu.roofline import CARDS, model_flop, step_parts
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.speed import JOBS
from benchmarks.gpu.wheels import split

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_shapes_have_the_parameters_of_the_models_that_they_are_named_after(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].config())
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_every_job_has_a_tiny_model_of_its_kind():
    for job in JOBS:
        tiny = SHAPES[job.shape].tiny()
        assert tiny.model_type == SHAPES[job.shape].model_type
        assert tiny.attention_layers >= 1
        assert (tiny.attention_layers < tiny.layers) == (SHAPES[job.shape].full_attention_every > 1)


def test_lora_counts_two_passes_and_full_training_three():
    shape = SHAPES["llama-3-8b"]
    linear = {method: step_parts(shape, 1000, 1000, method)[0].flop for method in ("lora", "full")}
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert linear == {"lora": 2 * 1000 * weights * 2, "full": 2 * 1000 * weights * 3}


def test_flop_of_the_published_mark_agree_with_the_count_within_a_tenth():
    # NeMo AutoModel states 402 TFLOP/s at 12,473 tokens/s for LoRA of Llama-3-8B at 4,096 tokens
    per_token = model_flop(SHAPES["llama-3-8b"], 4096, 4096, "lora") / 4096
    assert per_token * 12_473 / 1e12 == pytest.approx(402, rel=0.1)


def test_pointwise_layers_are_bound_by_memory_and_products_by_compute():
    bounds = {part.name: part.bound(CARDS["h100"]) for part in step_parts(SHAPES["llama-3-8b"], 4096, 4096)}
    assert bounds["linear layers"] == "compute"
    assert bounds["norms, SwiGLU, residuals"] == "memory"


@pytest.mark.numerics
def test_one_case_is_compared_with_the_plain_training():
    case = next(case for case in CASES if case.name == "float32, packed")
    row = compare(case, "cpu", {})
    assert row["verdict"] == "equal", row


def test_a_case_that_this_device_cannot_run_is_skipped_with_the_reason():
    case = next(case for case in CASES if case.name == "attention: flex_attention")
    assert compare(case, "cpu", {}) == {"case": case.name, "verdict": "skipped", "reason": "needs a GPU"}


def test_wheels_are_split_into_folders_below_the_limit(tmp_path):
    everything = tmp_path / "all"
    everything.mkdir()
    for name, megabytes in (("a", 50), ("b", 30), ("c", 9), ("d", 29)):
        with (everything / f"{name}-1.whl").open("wb") as file:
            file.truncate(megabytes * 1_000_000)
    parts = split(everything, tmp_path)
    assert [sorted(path.name for path in part.iterdir()) for part in parts] == [
        ["a-1.whl", "c-1.whl"],
        ["b-1.whl", "d-1.whl"],
    ]


@pytest.mark.slow
def test_speed_prints_a_row_per_contender_at_a_tiny_shape(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--out",
        str(tmp_path),
        "speed",
        "--tiny",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run([*command, "--only", "smollm2-1.7b lora long sft"], capture_output=True, text=True, cwd=ROOT)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["sft", "sft, Liger", "sft, compiled"]
    assert rows[0]["tokens"] == [256, 256]
    assert rows[0]["tokens_per_second"] > 0
    assert "| smollm2-1.7b | lora | long, 256 | sft |" in done.stdout
    assert "use_liger_kernel=True cannot be used" in rows[1]["reason"]


def test_a_ratio_that_became_worse_is_named_with_both_commits():
    old = {"machine": "m", "benchmark": "train", "commit": "aaa", "ratios": {"sft / trl": 3.0, "other": 1.0}}
    new = {"machine": "m", "benchmark": "train", "commit": "bbb", "ratios": {"sft / trl": 2.0, "other": 1.05}}
    elsewhere = {"machine": "n", "benchmark": "train", "commit": "ccc", "ratios": {"sft / trl": 1.0}}
    assert moved([old, new, elsewhere]) == [
        "train on m: sft / trl 3.0 (aaa) -> 2.0 (bbb), -33%, WORSE",
        "train on n: one run (ccc), nothing to compare with",
    ]
