"""Liger's kernels on the CPU against torch's: run by test_liger.py in processes of their own, with TRITON_INTERPRET=1.

Prints one line of JSON for the part that is named: what is compared -> largest difference. Triton's interpreter lacks
two things that its compiler has, supplied here: float arguments of a kernel as float32 scalars, and libdevice.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from liger_kernel.transformers.rms_norm import LigerRMSNorm
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from triton.runtime import interpreter

from sft.attention.kernels import SFT_DOCUMENTS
from sft.batches.collator import DataCollatorForSFT
from sft.batches.layout import document_layout
from sft.kernels.liger import interpreting, liger_kernel_config
from sft.loss.cross_entropy import Head, LossOptions, linear_cross_entropy_sums
from sft.loss.supervised import supervised_loss
from tests.tiny import tiny_model, tiny_tokenizer

Tensors = list[torch.Tensor]
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
]


def complete_the_interpreter() -> None:
    """Supply what Triton's interpreter lacks and its compiler has."""
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda value: tl.rsqrt(value)
    geglu.tanh = lambda value: 2 * tl.sigmoid(2 * value) - 1


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: torch.Tensor) -> float:
    """Largest difference of outputs and of the gradients of all inputs, which each side gets copies of."""
    results = []
    for function in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        # Liger's kernels overwrite what they are given; leaves stay as they are
        outputs = function(*(leaf * 1.0 for leaf in leaves))
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        values = [output.detach().clone() for output in outputs]
        torch.stack([(output * random(*output.shape, seed=9)).sum() for output in outputs]).sum().backward()
        results.append([*values, *(leaf.grad for leaf in leaves)])
    return max((left - right).abs().max().item() for left, right in zip(*results, strict=True))


def norm(kind: Callable[..., torch.nn.Module], **options: Any) -> Callable[..., torch.Tensor]:
    def apply(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        module = kind(16, eps=1e-6, **options)
        del module.weight
        module.weight = weight
        return module(states)

    return apply


def our_head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    targets = torch.arange(hidden.shape[0])
    return linear_cross_entropy_sums(
        hidden, Head(weight), targets, torch.ones(len(targets)), LossOptions(label_smoothing=0.1)
    ).loss


def their_head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", label_smoothing=0.1)(
        weight, hidden, torch.arange(hidden.shape[0])
    )


def kernels() -> dict[str, float]:
    states, gate = random(2, 5, 16, seed=0), random(2, 5, 16, seed=1)
    query, key = random(2, 4, 5, 8, seed=2), random(2, 2, 5, 8, seed=3)
    angle = random(1, 5, 4, seed=4)
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
    weight = random(16, seed=5)
    gemma = {"offset": 1.0, "casting_mode": "gemma"}
    return {
        "RMSNorm": difference(norm(LlamaRMSNorm), norm(LigerRMSNorm), states, weight),
        "RMSNorm of Gemma": difference(norm(GemmaRMSNorm), norm(LigerRMSNorm, **gemma), states, weight),
        "SwiGLU": difference(lambda a, b: F.silu(a) * b, LigerSiLUMulFunction.apply, states, gate),
        "GeGLU": difference(
            lambda a, b: F.gelu(a, approximate="tanh") * b, geglu.LigerGELUMulFunction.apply, states, gate
        ),
        "RoPE": difference(
            partial(apply_rotary_pos_emb, cos=cos, sin=sin), partial(liger_rotary_pos_emb, cos=cos, sin=sin), query, key
        ),
        "fused linear cross entropy": difference(our_head, their_head, random(7, 16, seed=6), random(50, 16, seed=7)),
    }


def step(model: Any, flat: bool) -> Tensors:
    """Loss, hits and gradients of a batch."""
    # transformers' evaluation adds skip_logits for Liger
    inputs = {**DataCollatorForSFT(pad_token_id=3, padding_free=flat)(ROWS), "skip_logits": True}
    model.zero_grad()
    with document_layout(inputs.get("seq_lengths")):
        result = supervised_loss(model, inputs)
        result.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [result.loss.detach(), result.num_correct.float(), *gradients]


def model_head_rows(model: Any) -> int:
    """Rows that the model's own head computes in a step, of which the loss should leave it none."""
    rows, forward = [], torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        rows.append(states.shape[:-1].numel() if self is model.lm_head else 0)
        return forward(self, states)

    torch.nn.Linear.forward = counted
    step(model, flat=True)
    torch.nn.Linear.forward = forward
    return sum(rows)


def models(family: str) -> dict[str, float]:
    found = {}
    plain = {flat: step(model_of(family), flat) for flat in (False, True)}
    for config in ("ours", "with Liger's own loss"):
        model = model_of(family).train()
        apply_liger_kernel(model, liger_kernel_config(model) if config == "ours" else None)
        for flat, expected in plain.items():
            pairs = zip(step(model, flat), expected, strict=True)
            name = f"{'flat' if flat else 'padded'}, {config}"
            found[name] = max((left - right).abs().max().item() for left, right in pairs)
        found[f"rows of the model's head, {config}"] = model_head_rows(model)
    return found


def model_of(family: str) -> Any:
    model = tiny_model(family)
    model.set_attn_implementation(SFT_DOCUMENTS)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.add_(random(*parameter.shape, seed=number) * 0.2)
    return model


def trainer(use_liger_kernel: bool) -> list[float]:
    """Losses of a training and its evaluation through `SFTTrainer`."""
    from datasets import Dataset

    from sft.config import SFTConfig
    from sft.train.trainer import SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=str(Path(folder)), use_cpu=True, max_steps=2, max_length=16, packing=True, report_to=[],
            disable_tqdm=True, logging_steps=1, learning_rate=1e-2, save_strategy="no",
            per_device_train_batch_size=1, use_liger_kernel=use_liger_kernel,
        )  # fmt: skip
        rows = Dataset.from_list(ROWS)
        made = SFTTrainer(
            tiny_model(), args=config, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
        )
        made.train()
        made.evaluate()
    return [entry[key] for entry in made.state.log_history for key in ("loss", "eval_loss") if key in entry]


def trainers() -> dict[str, float]:
    launches: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    plain = trainer(False)
    assert not launches
    patched = trainer(True)
    assert len(plain) == len(patched) == 3
    difference_of_losses = max(abs(left - right) for left, right in zip(plain, patched, strict=True))
    return {"losses": difference_of_losses, **{name: launches.count(name) for name in launches}}


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "kernels": kernels,
    "llama": partial(models, "llama"),
    "gemma2": partial(models, "gemma2"),
    "trainers": trainers,
}

if __name__ == "__main__":
    assert interpreting()
    complete_the_interpreter()
    print(json.dumps(PARTS[sys.argv[1]]()))
