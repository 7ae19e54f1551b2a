"""Liger is refused with a message if it can't run, leaves the loss to this library, and computes the same as torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from sft.hardware import Hardware, current_hardware
from sft.kernels.liger import check_liger_hardware, liger_kernel_config
from sft.loss.supervised import supervised_loss
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

GPU = Hardware("cuda", (8, 0), frozenset({"triton", "liger_kernel"}))
ROOT = Path(__file__).resolve().parents[3]


def interpreted(part: str) -> dict[str, float]:
    """Run a part of `liger_interpreted.py` in a process in which Triton interprets its programs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sft.liger_interpreted", part],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_cpu_is_refused_because_triton_has_no_device_there() -> None:
    with pytest.raises(ValueError, match=r"Triton has no device here \(training is on 'cpu', .*use_liger_kernel=False"):
        check_liger_hardware(current_hardware(torch.device("cpu")))


@pytest.mark.parametrize(
    ("hardware", "complaint"),
    [
        (replace(GPU, packages=frozenset({"triton"})), "pip install liger-kernel"),
        (replace(GPU, packages=frozenset()), "pip install triton liger-kernel"),
        (replace(GPU, device_type="mps"), "training is on 'mps'"),
        (replace(GPU, capability=(6, 1)), "needs compute capability 7.0, and the GPU has 6.1"),
    ],
)
def test_missing_packages_and_capabilities_are_named(hardware: Hardware, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_liger_hardware(hardware)


@pytest.mark.parametrize("hardware", [GPU, replace(GPU, capability=(7, 0)), replace(GPU, device_type="xpu")])
def test_devices_of_triton_pass(hardware: Hardware) -> None:
    check_liger_hardware(hardware)


def test_interpreter_counts_as_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_liger_hardware(replace(GPU, device_type="cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2"])
def test_ligers_own_loss_is_off_and_the_rest_is_as_asked(family: str) -> None:
    config = liger_kernel_config(tiny_model(family), {"rope": False})
    assert config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


def test_model_inside_an_adapter_is_found() -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    assert liger_kernel_config(adapted) == {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "gpt_neox"])
def test_family_without_kernels_is_refused_since_nothing_would_change(family: str) -> None:
    with pytest.raises(ValueError, match=f"no effect: Liger has no kernels for '{family}' models, only for .*llama"):
        liger_kernel_config(tiny_model(family))


def test_misspelt_kernel_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'rms_norms', .* did you mean 'rms_norm'\? Use rope, rms_norm, swiglu\."):
        liger_kernel_config(tiny_model(), {"rms_norms": True})


@pytest.mark.parametrize("name", ["cross_entropy", "fused_linear_cross_entropy"])
def test_asking_for_ligers_own_loss_is_refused_since_it_would_never_run(name: str) -> None:
    with pytest.raises(ValueError, match=f"asks for '{name}', which would have no effect: the loss here fuses head"):
        liger_kernel_config(tiny_model(), {name: True})
    liger_kernel_config(tiny_model(), {name: False})


@pytest.mark.parametrize("keep_logits", [False, True])
def test_the_key_that_evaluation_adds_for_ligers_loss_never_reaches_the_model(keep_logits: bool) -> None:
    model, seen = tiny_model(), []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    ids = torch.arange(4, 10)[None]
    supervised_loss(model, {"input_ids": ids, "labels": ids, "skip_logits": True}, keep_logits=keep_logits)
    handle.remove()
    assert seen
    assert not any({"skip_logits", "labels"} & names for names in seen)


def test_ligers_kernels_compute_what_torch_and_our_loss_compute() -> None:
    found = interpreted("kernels")
    assert found.keys() == {
        "RMSNorm",
        "RMSNorm of Gemma",
        "SwiGLU",
        "GeGLU",
        "RoPE",
        "fused linear cross entropy",
    }
    assert max(found.values()) < 2e-5


def test_the_trainer_asks_for_ligers_kernels_without_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = quiet_config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    rows = Dataset.from_dict({"text": ["The quick brown fox"]})
    SFTTrainer(tiny_model(), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    assert args.liger_kernel_config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_model_with_ligers_kernels_has_the_same_loss_hits_and_gradients(family: str) -> None:
    """Also if Liger's own loss was installed in the model's forward: the model's head does not run then either."""
    found = interpreted(family)
    assert found.keys() == {
        f"{what}, {config}"
        for what in ("flat", "padded", "rows of the model's head")
        for config in ("ours", "with Liger's own loss")
    }
    assert max(found.values()) < 1e-5
    assert [found[name] for name in found if name.startswith("rows")] == [0, 0]


@pytest.mark.slow
def test_trainer_with_ligers_kernels_has_the_same_losses() -> None:
    found = interpreted("trainers")
    assert found.pop("losses") < 1e-5
    kernels = {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_swiglu_forward_kernel", "_triton_rope"}
    assert kernels <= found.keys()
    assert not any("cross_entropy" in name for name in found)
