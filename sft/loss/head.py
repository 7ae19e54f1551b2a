"""Language model head of a model: run on some positions only, or skipped in the model and applied by the loss."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sft.batches.layout import document_layout
from sft.inner_model import causal_lm, evaluating, learns_prompt
from sft.loss.cross_entropy import Head
from sft.loss.targets import Batch, model_arguments

_VERIFIED_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Model -> whether its head was found to be a plain linear map, see `plain_head`."""


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Return whether the model's head can run on listed positions only.

    With prompt tuning it can't be used: virtual tokens come first in the row and would shift the positions.
    """
    if learns_prompt(model):
        return False
    return "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters


def states_before_head(model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Any]:
    """Run the model, wrappers included, without its head.

    A forward pre-hook stores the head's input and passes an empty sequence on to the head.

    Returns:
        Hidden states `(batch, length, hidden)` that the head would have been given, and the output object of the
        model, whose logits are empty.
    """
    head_inputs: list[torch.Tensor] = []

    def keep_input(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        head_inputs[:] = [arguments[0]]
        return (arguments[0][..., :0, :],)

    handle = causal_lm(model).get_output_embeddings().register_forward_pre_hook(keep_input)
    try:
        outputs = model(**model_arguments(model, inputs))
    finally:
        handle.remove()
    return head_inputs[0], outputs


def plain_head(model: nn.Module) -> Head | None:
    """Return the model's head if it is a linear map that can be applied outside the model with the same result.

    Models may do anything to their logits, so this is verified once per model on a few tokens.

    Returns:
        The head, or None if it is more than a linear map, or quantized, adapted, sharded, offloaded or compiled.
    """
    base = causal_lm(model)
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or not _is_ordinary(model, module) or not takes_logits_to_keep(model):
        return None
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))
    if base not in _VERIFIED_HEADS:
        _VERIFIED_HEADS[base] = _gives_same_logits(base, head)
    return head if _VERIFIED_HEADS[base] else None


def _is_ordinary(model: nn.Module, head: nn.Linear) -> bool:
    """Return whether the head's weight is an ordinary tensor of this process, without hooks and not compiled."""
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    hooked = bool(head._forward_pre_hooks or head._forward_hooks or hasattr(head, "_hf_hook"))
    weight = head.weight
    special = weight.is_meta or hasattr(weight, "ds_id") or type(weight) is not nn.Parameter
    return not (compiled or hooked or special) and weight.is_floating_point()


@torch.no_grad()
def _gives_same_logits(base: nn.Module, head: Head) -> bool:
    """Compare the model's own logits of four tokens with those of `head` on the states before the head."""
    inputs = {"input_ids": torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]}
    with evaluating(base), document_layout(None):
        expected = base(**inputs, use_cache=False).logits[0].float()
        hidden, _ = states_before_head(base, inputs)
    found = head.logits(hidden[0])
    tolerance = 1e-5 if torch.finfo(hidden.dtype).eps < 1e-6 else 2e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
