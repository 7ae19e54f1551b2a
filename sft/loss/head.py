"""A model's language model head: run on some positions only, or left out and applied by the loss itself."""

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


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model's head can run on listed positions.

    Prompt tuning lengthens the row, which would shift the positions, so it gets all logits.
    """
    if learns_prompt(model):
        return False
    return "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters


class _HeadInput:
    """A hook that keeps the head's input and gives the head nothing to do."""

    hidden: torch.Tensor

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        self.hidden = arguments[0]
        return (arguments[0][..., :0, :],)


def states_before_head(model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Any]:
    """Run the model through its own wrappers, but for the head; hidden states `(batch, length, hidden)` and output."""
    head_input = _HeadInput()
    handle = causal_lm(model).get_output_embeddings().register_forward_pre_hook(head_input)
    try:
        outputs = model(**model_arguments(inputs))
    finally:
        handle.remove()
    return head_input.hidden, outputs


_VERIFIED_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain_head(model: nn.Module) -> Head | None:
    """The model's head, if it is a linear map that can be applied outside of the model with the same result.

    Whether it is gets tried once for each model, on a few tokens: models may do anything to their logits.

    Returns:
        The head, or None when it is quantized, adapted, sharded, offloaded or compiled, or more than a linear map.
    """
    base = causal_lm(model)
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or not _is_whole(model, module) or not takes_logits_to_keep(model):
        return None
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))
    if base not in _VERIFIED_HEADS:
        _VERIFIED_HEADS[base] = _gives_same_logits(base, head)
    return head if _VERIFIED_HEADS[base] else None


def _is_whole(model: nn.Module, head: nn.Linear) -> bool:
    """Whether the head's weight is an ordinary tensor of this process, and no hook or compiler stands before it."""
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    hooked = bool(head._forward_pre_hooks or head._forward_hooks or hasattr(head, "_hf_hook"))
    weight = head.weight
    special = weight.is_meta or hasattr(weight, "ds_id") or type(weight) is not nn.Parameter
    return not (compiled or hooked or special) and weight.is_floating_point()


@torch.no_grad()
def _gives_same_logits(base: nn.Module, head: Head) -> bool:
    inputs = {"input_ids": torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]}
    with evaluating(base), document_layout(None):
        expected = base(**inputs, use_cache=False).logits[0].float()
        hidden, _ = states_before_head(base, inputs)
    found = head.logits(hidden[0])
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 2e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
