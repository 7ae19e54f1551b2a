"""Products of either library equal torch's own, and the choice depends on the processor only."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sft.kernels import products
from sft.kernels.products import back_through_linear, linear, uses_onednn

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_equal_torchs_own(onednn: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_for_float32", lambda: onednn)
    torch.manual_seed(0)
    rows, weight, gradient = torch.randn(70, 24), torch.randn(40, 24), torch.randn(70, 40)
    shift = torch.randn(40) if bias else None
    assert uses_onednn(rows, weight) is onednn
    torch.testing.assert_close(linear(rows, weight, shift), torch.nn.functional.linear(rows, weight, shift))
    torch.testing.assert_close(back_through_linear(gradient, weight), gradient @ weight)


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (torch.zeros(70, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)),
        (torch.zeros(70, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)),
        (torch.zeros(3, 8), torch.zeros(4, 8)),
        (torch.zeros(70, 8, device="meta"), torch.zeros(4, 8, device="meta")),
    ],
    ids=["bfloat16", "float64", "few rows", "another device"],
)
def test_other_products_are_left_to_torch(
    rows: torch.Tensor, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "onednn_for_float32", lambda: True)
    assert not uses_onednn(rows, weight)


def test_onednn_can_be_switched_off_with_torchs_own_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_for_float32", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not uses_onednn(torch.zeros(70, 8), torch.zeros(4, 8))


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_onednn_is_taken_where_the_processor_has_avx512(
    capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.onednn_for_float32.__wrapped__() is (expected and torch.backends.mkldnn.is_available())


GROWTH = """
import psutil, torch
from sft.kernels.products import back_through_linear, linear, onednn_for_float32
torch.set_num_threads(1)
weight, rows, sizes = torch.randn(192, 576), torch.randn(600, 576), []
for number in range(100, 600, 2):
    back_through_linear(linear(rows[:number], weight), weight)
    sizes.append(psutil.Process().memory_info().rss / 1e6)
print(onednn_for_float32(), sizes[-1] - sizes[50])
"""


def test_memory_does_not_grow_with_the_sizes_that_were_met() -> None:
    taken, growth = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    ).stdout.split()
    if taken != "True":
        pytest.skip("this processor leaves products to MKL")
    assert float(growth) < 100  # 200 further sizes; without bounds some 300
