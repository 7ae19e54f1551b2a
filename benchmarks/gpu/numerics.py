"""Trainings on a device beside the same training on the CPU in float32: `python -m benchmarks.gpu numerics`.

Each case is one way to compute the same updates. A random model of two layers is trained for four steps of SGD, whose
change of the weights is the sum of the gradients, so that rounding is not amplified as it would be by Adam. Two
figures are compared with the plain training on the CPU: the largest difference of a step's loss, and |change -
reference| / |reference| over the trained weights. What the device or a missing package can't run is skipped with the
reason, and the table says so.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

import sft
from benchmarks.gpu.shapes import SHAPES, in_four_bits, random_model, word_tokenizer

STEPS = 4
WIDER = {"hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 2048}


@dataclass(frozen=True)
class Limits:
    """Largest differences from the reference: of a loss (nats), and of the weights' change (relative)."""

    loss: float
    change: float


EXACT = Limits(1e-4, 2e-3)
"""For float32 with products of full precision."""
HALF = Limits(3e-2, 0.12)
"""For bfloat16: 8 bits of mantissa, in activations and gradients."""
QUANTIZED = Limits(0.15, 0.7)
"""For 4-bit weights: another model, whose loss must stay near."""


@dataclass(frozen=True)
class Case:
    """A way to compute the same updates.

    Attributes:
        name: As the table prints it.
        limits: How near the reference it must be.
        options: Of `SFTConfig`.
        dtype: Of the weights.
        attention: An `attn_implementation`; None = the library chooses.
        shape: Of `SHAPES`, made tiny.
        method: lora, qlora or full.
        needs: Returns why the case can't run here, or None.
    """

    name: str
    limits: Limits
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    attention: str | None = None
    shape: str = "llama-3-8b"
    method: str = "lora"
    needs: Callable[[str], str | None] = lambda _: None


def _package(name: str) -> Callable[[str], str | None]:
    def missing(_: str) -> str | None:
        return None if find_spec(name) else f"the package {name} is not installed"

    return missing


def _gpu(also: str | None = None) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        return "needs a GPU" if device == "cpu" else _package(also)(device) if also else None

    return missing


PACKED = {"packing": True, "max_length": 256}
CASES = [
    Case("float32, packed", EXACT, PACKED),
    Case("float32, joined", EXACT, {"padding_free": True}),
    Case("float32, padded", EXACT, {"padding_free": False}),
    Case("full, packed", EXACT, PACKED, method="full"),
    Case("without fused layers", EXACT, {**PACKED, "fused_lora": False, "fused_layers": False, "share_tokens": False}),
    Case("attention: sdpa", EXACT, PACKED, attention="sdpa"),
    Case("attention: eager", EXACT, PACKED, attention="eager"),
    Case("attention: flex_attention", EXACT, PACKED, attention="flex_attention", needs=_gpu()),
    Case("attention: flash_attention_2", HALF, PACKED, torch.bfloat16, "flash_attention_2", needs=_gpu("flash_attn")),
    Case(
        "attention: flash_attention_3",
        HALF,
        PACKED,
        torch.bfloat16,
        "flash_attention_3",
        needs=_gpu("flash_attn_interface"),
    ),
    Case("bfloat16 weights, packed", HALF, PACKED, torch.bfloat16),
    Case("bfloat16 weights, padded", HALF, {"padding_free": False}, torch.bfloat16),
    Case("bf16 autocast, packed", HALF, {**PACKED, "bf16": True}),
    Case("bf16 autocast, full", HALF, {**PACKED, "bf16": True}, method="full"),
    Case("torch's flash kernel alone", HALF, {**PACKED, "force_flash_sdp": True}, torch.bfloat16, "sdpa", needs=_gpu()),
    Case("Liger kernels", EXACT, {**PACKED, "use_liger_kernel": True}, needs=_gpu("liger_kernel")),
    Case(
        "Liger kernels, bfloat16",
        HALF,
        {**PACKED, "use_liger_kernel": True},
        torch.bfloat16,
        needs=_gpu("liger_kernel"),
    ),
    Case("gradient checkpointing", EXACT, {**PACKED, "gradient_checkpointing": True}),
    Case(
        "selective checkpointing",
        EXACT,
        {**PACKED, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
    ),
    Case("activations in host memory", EXACT, {**PACKED, "activation_offloading": True}, needs=_gpu()),
    Case("torch.compile", EXACT, {**PACKED, "torch_compile": True}),
    Case("gated delta nets, packed", EXACT, PACKED, shape="qwen3.5-9b"),
    Case("gated delta nets, bfloat16", HALF, PACKED, torch.bfloat16, shape="qwen3.5-9b"),
    Case("qwen2, packed", EXACT, PACKED, shape="qwen2.5-7b"),
    Case("qwen3, packed", EXACT, PACKED, shape="qwen3-8b"),
    Case("QLoRA", QUANTIZED, PACKED, torch.bfloat16, method="qlora", needs=_package("bitsandbytes")),
]


def rows(vocabulary: int, seed: int = 0) -> Dataset:
    """Return documents of 8 to 120 tokens, of which the second half is trained."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 120, (STEPS * 8,), generator=generator).tolist()
    documents = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    masks = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return Dataset.from_dict({"input_ids": documents, "completion_mask": masks})


def make_trainer(case: Case, device: str, folder: str, **further: Any) -> sft.SFTTrainer:
    """Return the trainer of a case; weights, rows and their order are the same for all cases of a shape and method."""
    shape = replace(SHAPES[case.shape].tiny(), **WIDER)
    # weights are drawn on the CPU in float32: the generators of devices differ
    model = random_model(shape, "cpu", torch.float32, case.attention or "sdpa").to(case.dtype)
    if case.method == "qlora":
        model = in_four_bits(model, folder, device)
    options = {
        "output_dir": folder,
        "learning_rate": 0.5 if case.method != "full" else 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8 if not case.options.get("packing") else 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "bf16": False,
        "tf32": False if device == "cuda" else None,
        "shuffle_dataset": False,
        **case.options,
        **further,
    }
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian"
    )
    torch.manual_seed(1)
    trainer = sft.SFTTrainer(
        model,
        args=sft.SFTConfig(**options),
        train_dataset=rows(shape.vocabulary),
        processing_class=word_tokenizer(shape.vocabulary),
        peft_config=None if case.method == "full" else lora,
    )
    _start_from_both(trainer.model)
    return trainer


def _start_from_both(model: torch.nn.Module) -> None:
    """Give LoRA's second matrices values, so that both matrices have gradients from the first step."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            weight.data.copy_((torch.randn(weight.shape, generator=generator) * 0.02).to(weight.dtype))


def train(case: Case, device: str, **further: Any) -> tuple[list[float], torch.Tensor]:
    """Train, and return the losses of the steps and the change of all trained weights, as one vector in float64."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, device, folder, **further)
        trained = {name: weight for name, weight in sorted(trainer.model.named_parameters()) if weight.requires_grad}
        before = {name: weight.detach().cpu().double().clone() for name, weight in trained.items()}
        trainer.train()
        change = torch.cat([(trained[name].detach().cpu().double() - before[name]).flatten() for name in trained])
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    del trainer
    gc.collect()
    return losses, change


def reference_of(case: Case) -> Case:
    """Return the plain training of the same rows on the CPU: one document after the other would be the same."""
    plain = {"fused_lora": False, "fused_layers": False, "share_tokens": False}
    layout = {key: case.options[key] for key in ("packing", "max_length", "padding_free") if key in case.options}
    method = "lora" if case.method == "qlora" else case.method
    return Case("reference", EXACT, {**layout, **plain}, shape=case.shape, method=method)


def compare(case: Case, device: str, references: dict[str, Any]) -> dict[str, Any]:
    """Run a case and its reference (once per kind), and return the row of the table."""
    reason = case.needs(device)
    if reason:
        return {"case": case.name, "verdict": "skipped", "reason": reason}
    reference = reference_of(case)
    key = repr((reference.options, reference.shape, reference.method))
    try:
        if key not in references:
            references[key] = train(reference, "cpu")
        losses, change = train(case, device)
    except Exception as error:  # a case that fails is a row of the table, and the others still run
        traceback.print_exc()
        return {"case": case.name, "verdict": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    expected, expected_change = references[key]
    loss = max(abs(left - right) for left, right in zip(losses, expected, strict=True))
    relative = float((change - expected_change).norm() / expected_change.norm())
    good = loss <= case.limits.loss and relative <= case.limits.change
    return {
        "case": case.name,
        "verdict": "equal" if good else "differs",
        "loss": loss,
        "change": relative,
        "losses": losses,
    }


def eight_bit_adam(device: str) -> dict[str, Any]:
    """Compare the losses of 8-bit AdamW with those of AdamW in float32."""
    reason = _package("bitsandbytes")(device)
    if reason:
        return {"case": "8-bit AdamW", "verdict": "skipped", "reason": reason}
    rates = {"learning_rate": 1e-3, "max_grad_norm": 1.0}
    plain = Case("AdamW", EXACT, {**PACKED, "optim": "adamw_torch", **rates})
    small = Case("8-bit AdamW", EXACT, {**PACKED, "optim": "adamw_bnb_8bit", **rates})
    try:
        expected, change = train(plain, device)
        losses, small_change = train(small, device)
    except Exception as error:
        traceback.print_exc()
        return {"case": small.name, "verdict": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    loss = max(abs(left - right) for left, right in zip(losses, expected, strict=True))
    relative = float((small_change - change).norm() / change.norm())
    good = loss <= 3e-2 and relative <= 0.3
    return {"case": small.name, "verdict": "equal" if good else "differs", "loss": loss, "change": relative}


def resumed(device: str) -> dict[str, Any]:
    """Compare a training that goes on from a checkpoint with an uninterrupted one, bit for bit."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    case = Case("resume", EXACT, {**PACKED, "optim": "adamw_torch_fused", "learning_rate": 1e-3, **saving})
    try:
        with tempfile.TemporaryDirectory() as folder:
            complete = make_trainer(case, device, folder)
            complete.train()
            again = make_trainer(case, device, folder)
            again.train(resume_from_checkpoint=str(Path(folder, "checkpoint-2")))
            pairs = zip(complete.model.parameters(), again.model.parameters(), strict=True)
            largest = max(float((left - right).detach().abs().max()) for left, right in pairs)
    except Exception as error:
        traceback.print_exc()
        return {"case": case.name, "verdict": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"case": case.name, "verdict": "equal" if largest == 0 else "differs", "change": largest}


def one_rank_fsdp2(device: str) -> dict[str, Any]:
    """Train by FSDP2 on one process, in a child, and compare with the same training without it."""
    row = {"case": "FSDP2, one process"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    command += ["benchmarks.gpu", "fsdp2-child", "--device", device]
    switches = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    done = subprocess.run(command, env={**os.environ, **switches}, capture_output=True, text=True, timeout=300)
    losses = [line.removeprefix("LOSSES ") for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    if done.returncode or not losses:
        return {**row, "verdict": "failed", "reason": (done.stderr or done.stdout).strip()[-400:]}
    found = [float(value) for value in losses[0].split()]
    expected, _ = train(Case("alone", EXACT, PACKED, method="full"), device)
    loss = max(abs(left - right) for left, right in zip(found, expected, strict=True))
    return {**row, "verdict": "equal" if loss <= EXACT.loss else "differs", "loss": loss}


def fsdp2_child(device: str) -> None:
    """Train as the child of `one_rank_fsdp2` and print the losses."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Case("child", EXACT, PACKED, method="full"), device, folder)
        trainer.train()
        print("LOSSES", *(log["loss"] for log in trainer.state.log_history if "loss" in log), flush=True)


def run(device: str, only: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all cases, or those whose names contain one of `only`, and return a row for each."""
    wanted = lambda name: not only or any(part in name for part in only)  # noqa: E731
    references: dict[str, Any] = {}
    found = []
    for case in CASES:
        if wanted(case.name):
            found.append(compare(case, device, references))
            print(line_of(found[-1]), flush=True)
    for name, check in (("8-bit AdamW", eight_bit_adam), ("resume", resumed), ("FSDP2, one process", one_rank_fsdp2)):
        if wanted(name):
            found.append(check(device))
            print(line_of(found[-1]), flush=True)
    return found


def line_of(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    loss, change = (f"{row[key]:.1e}" if key in row else "" for key in ("loss", "change"))
    return f"| {row['case']} | {row['verdict']} | {loss} | {change} | {row.get('reason', '')} |".replace("\n", " ")
