"""FSDP2 wherever torch has it: accelerate turns it on for GPUs alone, `fully_shard` works over gloo as well."""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from sft.inner_model import causal_lm


def settle_sharding(accelerator: Any) -> bool:
    """Turn FSDP2 on where a launcher asks for it (`ACCELERATE_USE_FSDP`) and accelerate, on a CPU, did not heed it.

    Left alone, each process would silently hold the whole model.

    Args:
        accelerator: `accelerate.Accelerator`, before anything was prepared with it.

    Returns:
        Whether it was turned on here.

    Raises:
        ValueError: FSDP1 is asked for, which torch has for accelerators only.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} needs GPUs, and these processes run on a CPU; set fsdp_version: 2 in "
            "the accelerate configuration"
        )
    # accelerate copies the one into the other whenever it looks at its state
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return True


def without_copies(model: Any, weights: dict[str, Any] | None) -> dict[str, Any] | None:
    """Weights that were gathered for saving, each tied one once: gathering made copies, which would all be written.

    Args:
        model: Sharded or not, with or without an adapter.
        weights: Name -> tensor; None where the model is saved from its own weights.
    """
    tied = getattr(causal_lm(model), "all_tied_weights_keys", None) or {}
    if weights is None:
        return None
    return {name: value for name, value in weights.items() if not (name in tied and tied[name] in weights)}
