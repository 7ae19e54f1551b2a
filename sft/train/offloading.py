"""Less memory for activations: kept in the host's memory, or computed again but for matrix products and attention."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

logger = logging.getLogger(__name__)

SELECTIVE = "selective"
"""Key of `activation_checkpointing_kwargs`: whether results of matrix products and attention are kept."""

KEPT_OPERATIONS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "_scaled_mm")
"""Operations whose results selective checkpointing keeps, with those of attention: they take the most time."""

ACCELERATORS = ("cuda", "xpu", "mps", "npu", "hpu")
MIN_BYTES = 1024
"""Smaller tensors stay on the device: moving them costs more time than it saves memory."""


@dataclass(frozen=True)
class _Parked:
    """A copy of a tensor in the host's memory, and the device it came from."""

    copy: torch.Tensor
    device: torch.device


class ActivationStore:
    """Moves tensors that autograd saves to the host, and back to their device when the backward pass needs them.

    Parameters and buffers stay where they are: autograd saves them, too, but they are on the device anyway.

    Args:
        model: Its parameters and buffers are not moved.
        devices: Types of devices whose tensors are moved.

    Attributes:
        num_bytes: Bytes moved to the host so far.
    """

    def __init__(self, model: nn.Module, devices: Collection[str] = ACCELERATORS) -> None:
        self.devices = frozenset(devices)
        self.num_bytes = 0
        kept = [*model.parameters(), *model.buffers()]
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def park(self, tensor: torch.Tensor) -> torch.Tensor | _Parked:
        """Move a saved tensor to the host, unless it is small, a weight, or on the host already."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type not in self.devices or size < MIN_BYTES or self._is_weight(tensor):
            return tensor
        self.num_bytes += size
        # with pinned memory the host does not wait for the copy; the order of the stream keeps it correct
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
    """Keep what autograd saves inside the block in the host's memory. Gradients stay the same to the last bit.

    With gradient checkpointing, autograd only saves the inputs of checkpointed blocks, and these are moved.

    Args:
        model: Its weights stay on the accelerator.
        enabled: False = do nothing.
        devices: Types of devices whose tensors are moved.
    """
    if not enabled:
        yield None
        return
    store = ActivationStore(model, devices)
    with torch.autograd.graph.saved_tensors_hooks(store.park, store.fetch):
        yield store


def check_offloading(device: torch.device) -> None:
    """Log a warning if offloading has no effect: on a CPU, activations are in the host's memory already."""
    if device.type not in ACCELERATORS:
        logger.warning(
            "activation_offloading=True saves nothing on %s: activations are in the host's memory already; "
            "gradient_checkpointing=True makes them fewer",
            device.type,
        )


def keeps_result(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return whether selective checkpointing keeps the result of an operation: of matrix products and attention."""
    name = getattr(getattr(operation, "overloadpacket", operation), "__name__", "")
    kept = name in KEPT_OPERATIONS or "scaled_dot_product" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> tuple[Any, Any]:
    """Return the two contexts of a checkpointed block that `torch.utils.checkpoint` takes as `context_fn`."""
    return create_selective_checkpoint_contexts(keeps_result)


@contextmanager
def selective_checkpointing(model: Any) -> Iterator[None]:
    """Have a model understand `selective` among the arguments of checkpointing inside the block.

    The options can't hold the function that torch takes, since they are saved as JSON.

    Args:
        model: Its method `activation_checkpointing_enable` is called when training begins.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        yield
        return

    def enable_selectively(*args: Any, **kwargs: Any) -> Any:
        arguments = kwargs.get("activation_checkpointing_kwargs")
        if isinstance(arguments, dict) and SELECTIVE in arguments:
            arguments = dict(arguments)
            if arguments.pop(SELECTIVE):
                arguments["context_fn"] = selective_contexts
            kwargs["activation_checkpointing_kwargs"] = arguments or None
        return enable(*args, **kwargs)

    model.activation_checkpointing_enable = enable_selectively
    try:
        yield
    finally:
        del model.activation_checkpointing_enable
