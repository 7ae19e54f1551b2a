"""Weights that loading and evaluation leave as they are, where the code of transformers or bitsandbytes changes them.

* `keeping_loaded_weights`: no loaded weight is initialized again.
* `keep_weights`: no weight is changed by an evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@contextmanager
def keeping_loaded_weights() -> Iterator[None]:
    """Have `from_pretrained` initialize only modules that lack a weight or a buffer in the checkpoint.

    transformers (5.23) initializes all modules and relies on `_init_weights` to skip loaded tensors. That of Youtu sets
    the row of the padding token to zero through `weight.data`, which is not skipped. The head shares that row.
    """
    initialize = PreTrainedModel._initialize_weights

    def initialize_incomplete(model: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            module._is_hf_initialized = True
        else:
            initialize(model, module, is_custom_code)

    PreTrainedModel._initialize_weights = initialize_incomplete
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialize


def keep_weights(model: nn.Module) -> None:
    """Have a model compute evaluations with the weights that it is trained with and saved from.

    Args:
        model: Model, wrapped or not. What evaluations have changed already is changed back as far as possible.
    """
    _keep_4bit_weights(model)
    _keep_rescaled_weights(model)


def _keep_rescaled_weights(model: nn.Module) -> None:
    """Turn off RWKV's division of weights by powers of two in evaluations, which keeps float16 from overflowing.

    It would be part of what is saved after an evaluation. It also changes what an adapter adds: the hidden states are
    divided as well, and the adapter's matrices are not.
    """
    for module in model.modules():
        if not hasattr(module, "layers_are_rescaled"):
            continue
        is_training = module.training
        module.training = True
        module._rescale_layers()  # multiplies the weights again if they are divided
        module.training = is_training
        module._rescale_layers = _leave_layers


def _leave_layers() -> None:
    """Leave the weights of all layers as they are."""


def _keep_4bit_weights(model: nn.Module) -> None:
    """Have 4-bit layers compute evaluations with the weights that they are trained with.

    On a CPU with bfloat16 products, bitsandbytes (0.50) packs the weights of a layer when it is first evaluated,
    whatever the compute dtype is, and goes on with them in training: their scales are rounded to bfloat16 for good, and
    products with them pass no gradient on to the layers before.

    Layers that are packed already are unpacked. Their rounded scales can't be restored, which is said.
    """
    num_packed = 0
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            num_packed += 1
            module.state_dict()  # bitsandbytes unpacks the weights of a layer that is saved
            if not state.nested:  # but leaves their scales as it packed them: (blocks per row, rows) in bfloat16
                state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    if num_packed:
        logger.warning(
            "%d 4-bit layers were evaluated on this CPU before training, for which bitsandbytes rounded the scales of "
            "their weights to bfloat16: they differ from the checkpoint's by up to 0.4 %%. To train with the exact "
            "ones, load the model anew, with sft.load_model if it is to be evaluated first",
            num_packed,
        )
