"""Fused layers of a complete model, after they were proved on it.

`fused_lora` and `fused_layers` compare each kind of layer with its fused form by itself. What the model's own code does
with a layer's output (change it in place, read it twice) shows only in the complete model: it is run on a few tokens,
forward and backward, with and without them. A class of layers that changes the result, or fails, is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sft.inner_model import causal_lm, in_training
from sft.kernels.layers import can_be_fused, fused_layers
from sft.kernels.lora import can_fuse, fused_lora, nonzero_update

logger = logging.getLogger(__name__)

NUM_TOKENS = 11
"""Tokens that the model is tried on."""

Result = tuple[torch.Tensor, torch.Tensor] | None
"""Logits, and the gradient of the embeddings; None if the model fails."""


@contextmanager
def replaced_by_fused(model: nn.Module, *, lora: bool, layers: bool, left_out: Collection[type] = ()) -> Iterator[None]:
    """Replace the forward of a model's layers by fused ones inside the block.

    Args:
        model: Causal model, wrapped or not, on the device that trains it.
        lora: Whether to replace LoRA layers.
        layers: Whether to replace norms, feed-forward layers and linear layers.
        left_out: Classes of layers that keep their own forward, see `find_unproven`.
    """
    with ExitStack() as stack:
        if lora:
            stack.enter_context(fused_lora(model, left_out))
        if layers:
            stack.enter_context(fused_layers(model, left_out))
        yield


def find_unproven(model: nn.Module, *, lora: bool, layers: bool) -> set[type]:
    """Return the classes of layers that change the model's results, or make it fail, when they run fused.

    Each is named in the log. Arguments as for `replaced_by_fused`.
    """
    candidates = {
        type(module) for module in model.modules() if (lora and can_fuse(module)) or (layers and can_be_fused(module))
    }
    if not candidates or any(parameter.is_meta for parameter in model.parameters()):
        return candidates
    ups = [
        weight.weight
        for layer in model.modules()
        if lora and can_fuse(layer)
        for weight in (layer.lora_B[layer.active_adapters[0]],)
    ]
    with nonzero_update(*ups), in_training(model):
        expected = _result(model)
        if expected is None:  # the model fails by itself: training will say how
            return candidates

        def changes(without: set[type]) -> bool:
            with replaced_by_fused(model, lora=lora, layers=layers, left_out=without):
                return not _same(expected, _result(model))

        if not changes(set()):
            return set()
        culprits = {kind for kind in candidates if changes(candidates - {kind})} or candidates
        if culprits != candidates and changes(culprits):
            culprits = candidates
    for kind in sorted(culprits, key=lambda kind: kind.__name__):
        logger.warning("layers of class %s run as they are: fused, they change what this model computes", kind.__name__)
    return culprits


def _result(model: Any) -> Result:
    """Run the model on a few tokens, forward and backward to its embeddings."""
    embeddings = causal_lm(model).get_input_embeddings()
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        states.append(output if output.requires_grad else output.requires_grad_())
        return states[-1]

    ids = torch.arange(NUM_TOKENS, device=embeddings.weight.device)[None] * 7 % embeddings.weight.shape[0]
    handle = embeddings.register_forward_hook(keep)
    devices = [embeddings.weight.device] if embeddings.weight.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            logits = model(input_ids=ids, use_cache=False).logits
            weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).reshape(logits.shape)
            (gradient,) = torch.autograd.grad((logits.float() * weights).sum(), states[:1])
    except Exception:  # code that is not known may fail in any way
        return None
    finally:
        handle.remove()
    return logits.detach(), gradient


def _same(expected: Result, found: Result) -> bool:
    if expected is None or found is None:
        return False
    pairs = zip(expected, found, strict=True)
    return all(bool((a - b).abs().max() <= _tolerance(a) * a.abs().max() + 1e-30) for a, b in pairs)


def _tolerance(tensor: torch.Tensor) -> float:
    """Return how far rounding may drive the results of a deep model apart, relative to the largest one."""
    return 1e-3 if torch.finfo(tensor.dtype).eps < 1e-6 else 1e-1
