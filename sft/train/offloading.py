"""Activation offloading: what the backward pass will need waits in the host's memory instead of the accelerator's."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

logger = logging.getLogger(__name__)

ACCELERATORS = ("cuda", "xpu", "mps", "npu", "hpu")
MIN_BYTES = 1024
"""Moving less than this costs more than it saves."""


@dataclass(frozen=True)
class _Parked:
    """A tensor in the host's memory, and where it belongs."""

    copy: torch.Tensor
    device: torch.device


class ActivationStore:
    """Parks tensors that autograd saves, and brings them back when the backward pass asks for them.

    Weights stay where they are: they are saved for the backward pass too, but they live on the accelerator anyway.

    Args:
        model: Whose parameters and buffers stay.
        devices: Types of devices whose tensors are parked.

    Attributes:
        num_bytes: What was parked so far.
    """

    def __init__(self, model: nn.Module, devices: Collection[str] = ACCELERATORS) -> None:
        self.devices = frozenset(devices)
        self.num_bytes = 0
        kept = [*model.parameters(), *model.buffers()]
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def park(self, tensor: torch.Tensor) -> torch.Tensor | _Parked:
        """Move a saved tensor to the host, unless it is small, a weight, or there already."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type not in self.devices or size < MIN_BYTES or self._is_weight(tensor):
            return tensor
        self.num_bytes += size
        # pinned memory lets the copy run beside the computation; both are in the order of one stream
        pinned = tensor.device.type == "cuda" and not tensor.is_sparse
        copy = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        copy.copy_(tensor, non_blocking=pinned)
        return _Parked(copy, tensor.device)

    def fetch(self, saved: torch.Tensor | _Parked) -> torch.Tensor:
        """Bring a saved tensor back to its device."""
        if isinstance(saved, _Parked):
            return saved.copy.to(saved.device, non_blocking=saved.copy.is_pinned())
        return saved

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._kept


@contextmanager
def offloaded_activations(
    model: nn.Module, *, enabled: bool = True, devices: Collection[str] = ACCELERATORS
) -> Iterator[ActivationStore | None]:
    """Park what autograd saves inside the block; gradients are the same to the last bit.

    Works together with gradient checkpointing: then only the inputs of the checkpointed blocks are saved, and parked.

    Args:
        model: Whose weights stay on the accelerator.
        enabled: Whether to do anything.
        devices: Types of devices whose tensors are parked.
    """
    if not enabled:
        yield None
        return
    store = ActivationStore(model, devices)
    with torch.autograd.graph.saved_tensors_hooks(store.park, store.fetch):
        yield store


def check_offloading(device: torch.device) -> None:
    """Say in the log when there is nothing to offload: on a CPU, activations are in the host's memory already."""
    if device.type not in ACCELERATORS:
        logger.warning(
            "activation_offloading=True saves nothing on %s: activations are in the host's memory already; "
            "gradient_checkpointing=True makes them fewer",
            device.type,
        )
