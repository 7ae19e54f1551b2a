"""Offloaded activations give the same gradients."""

from __future__ import annotations

import logging

import pytest
import torch

from sft.train.offloading import ActivationStore, check_offloading, offloaded_activations
from tests.tiny import tiny_model

pytestmark = pytest.mark.numerics

IDS = torch.arange(4, 68)[None]


def gradients(*, devices: tuple[str, ...], checkpointing: bool = False) -> tuple[dict[str, torch.Tensor], int]:
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with offloaded_activations(model, devices=devices) as store:
        model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, store.num_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_to_the_last_bit(checkpointing: bool) -> None:
    expected, none = gradients(devices=())
    # parked from the CPU to the CPU, the tensors take the way that they would take from an accelerator
    found, num_bytes = gradients(devices=("cpu",), checkpointing=checkpointing)
    assert none == 0
    assert num_bytes > 0
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_checkpointing_leaves_fewer_bytes_to_offload() -> None:
    assert gradients(devices=("cpu",), checkpointing=True)[1] < gradients(devices=("cpu",))[1]


def test_weights_views_of_them_and_small_tensors_stay() -> None:
    linear = torch.nn.Linear(64, 64)
    store = ActivationStore(linear, devices=("cpu",))
    for tensor in (linear.weight, linear.weight.t(), linear.weight[3:], torch.ones(3)):
        assert store.park(tensor) is tensor
    big = torch.randn(64, 64)
    parked = store.park(big)
    assert parked is not big
    assert torch.equal(store.fetch(parked), big)


def test_offloading_on_a_cpu_logs_that_it_saves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_offloading(torch.device("cuda"))
        assert caplog.text == ""
        check_offloading(torch.device("cpu"))
    assert "activation_offloading=True saves nothing on cpu" in caplog.text
