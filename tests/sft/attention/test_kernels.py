"""Kernels for flat rows give the same as attention document by document, and are chosen only if they can run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from sft.attention.kernels import ATTEND, Kernel, attend_flex, choose_kernel
from sft.attention.math import AttentionOptions, attend_by_document, explicit_attention
from sft.batches.layout import DocumentLayout
from sft.hardware import Hardware, current_hardware

pytestmark = pytest.mark.numerics

LAYOUT = DocumentLayout((7, 3, 3, 12))
PLAIN = AttentionOptions(scaling=0.3)
ALL = frozenset({"flash_attn", "flash_attn_interface", "triton", "torch.nn.attention.varlen"})
TRITON = frozenset({"triton"})
H100, A100, T4 = (Hardware("cuda", capability, ALL) for capability in ((9, 0), (8, 0), (7, 5)))


def states(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, LAYOUT.num_tokens, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]


def one_by_one(options: AttentionOptions) -> torch.Tensor:
    """Compute each document alone, with plain matrix products."""
    outputs, start = [], 0
    for length in LAYOUT.lengths:
        piece = [tensor[:, :, start : start + length] for tensor in states()]
        outputs.append(explicit_attention(piece[0], piece[1], piece[2], options))
        start += length
    return torch.cat(outputs, dim=1)


OPTIONS = [
    PLAIN,
    replace(PLAIN, is_causal=False),
    replace(PLAIN, sliding_window=4),
    replace(PLAIN, softcap=0.5),
    replace(PLAIN, softcap=0.5, sliding_window=4),
]


@pytest.mark.parametrize("options", [*OPTIONS, replace(PLAIN, sinks=torch.tensor([0.1, 0.2, 0.3, 0.4]))])
def test_document_by_document_is_each_document_alone(options: AttentionOptions) -> None:
    torch.testing.assert_close(attend_by_document(*states(), LAYOUT, options), one_by_one(options))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", OPTIONS)
def test_flex_attention_gives_the_same(options: AttentionOptions) -> None:
    layout = DocumentLayout(LAYOUT.lengths)
    with torch.no_grad():
        torch.testing.assert_close(attend_flex(*states(), layout, options), one_by_one(options))
        attend_flex(*states(), layout, options)
    assert len([key for key in layout.cache if key.startswith("block_mask")]) == 1


def flash_stand_in(*states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Compute what the kernels document, for tensors `(tokens, heads, dim)` and cumulative lengths."""
    ends = arguments["cu_seqlens_q"]
    assert ends.dtype == torch.int32
    assert arguments["max_seqlen_q"] == arguments["max_seqlen_k"] == 12
    left, right = arguments["window_size"]
    options = AttentionOptions(
        scaling=arguments["softmax_scale"],
        is_causal=arguments.get("causal", right == 0),
        sliding_window=None if left < 0 else left + 1,
        softcap=arguments["softcap"] or None,
    )
    outputs = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        query, key, value = (tensor[start:end].transpose(0, 1)[None] for tensor in states)
        outputs.append(explicit_attention(query, key, value, options)[0])
    return torch.cat(outputs)


def varlen_stand_in(*arguments: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
    assert enable_gqa
    query, key, value, ends_q, ends_k, longest_q, longest_k = arguments
    assert ends_q is ends_k
    named = {"cu_seqlens_q": ends_q, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k, "softmax_scale": scale}
    return flash_stand_in(query, key, value, **named, window_size=window_size, softcap=0.0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kernel", [Kernel.FLASH_3, Kernel.FLASH_2, Kernel.TORCH_VARLEN])
def test_variable_length_kernels_are_called_with_what_they_expect(
    kernel: Kernel, options: AttentionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel is Kernel.TORCH_VARLEN and options.softcap:
        pytest.skip("torch's kernel has no soft cap and is not chosen then")
    module = ModuleType(kernel)
    module.flash_attn_varlen_func = flash_stand_in  # type: ignore[attr-defined]
    module.varlen_attn = varlen_stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel, module)
    torch.testing.assert_close(ATTEND[kernel](*states(), LAYOUT, options), one_by_one(options))


@pytest.mark.parametrize(
    ("hardware", "dtype", "dims", "options", "expected"),
    [
        (Hardware("cpu", packages=ALL), torch.bfloat16, (64, 64), PLAIN, Kernel.BY_DOCUMENT),
        (H100, torch.bfloat16, (64, 64), PLAIN, Kernel.FLASH_3),
        (H100, torch.bfloat16, (64, 64), replace(PLAIN, dropout=0.1), Kernel.FLASH_2),
        (A100, torch.float16, (64, 64), PLAIN, Kernel.FLASH_2),
        (A100, torch.float16, (64, 64), replace(PLAIN, softcap=50.0), Kernel.FLASH_2),
        (A100, torch.float16, (64, 64), replace(PLAIN, softcap=50.0, dropout=0.1), Kernel.BY_DOCUMENT),
        (replace(A100, packages=ALL - {"flash_attn"}), torch.float16, (64, 64), PLAIN, Kernel.TORCH_VARLEN),
        (replace(A100, packages=TRITON), torch.float16, (64, 64), PLAIN, Kernel.BY_DOCUMENT),
        (
            replace(A100, packages=frozenset({"triton"})),
            torch.float16,
            (64, 64),
            replace(PLAIN, softcap=5.0),
            Kernel.FLEX,
        ),
        (A100, torch.float32, (64, 64), PLAIN, Kernel.BY_DOCUMENT),
        (A100, torch.float32, (64, 64), replace(PLAIN, sliding_window=8), Kernel.FLEX),
        (A100, torch.float32, (64, 64), replace(PLAIN, sliding_window=64), Kernel.BY_DOCUMENT),
        (A100, torch.float16, (192, 128), PLAIN, Kernel.BY_DOCUMENT),
        (A100, torch.float16, (512, 512), PLAIN, Kernel.BY_DOCUMENT),
        (T4, torch.float16, (64, 64), PLAIN, Kernel.BY_DOCUMENT),
        (A100, torch.float16, (64, 64), replace(PLAIN, sinks=torch.zeros(4)), Kernel.BY_DOCUMENT),
    ],
)
def test_kernel_is_the_fastest_that_can_do_what_is_asked(
    hardware: Hardware, dtype: torch.dtype, dims: tuple[int, int], options: AttentionOptions, expected: Kernel
) -> None:
    assert choose_kernel(hardware, dtype, dims, options, longest=64) is expected


def test_this_machine_is_described() -> None:
    hardware = current_hardware(torch.device("cpu"))
    assert (hardware.device_type, hardware.capability) == ("cpu", (0, 0))
    assert "torch.nn.attention.varlen" in hardware.packages


@pytest.mark.parametrize(
    "module", ["sft.attention.kernels", "sft.attention.isolation", "sft.models.loading", "sft.train.trainer"]
)
def test_importing_the_library_registers_its_attention_with_transformers(module: str) -> None:
    script = f"""
import {module}
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
print(*(table["sft_documents"].__name__ for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["document_attention_forward", "document_attention_mask"]
