"""Importance of the columns of each weight matrix, for llama.cpp's k- and i-quants.

It is the mean square of each input of a layer over training rows, as llama.cpp's own `llama-imatrix` measures it
(Kawrakow, ggml-org/llama.cpp pull request 4861), here with the checkpoint in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


@torch.inference_mode()
def measure_importance(
    model: nn.Module, rows: Sequence[Sequence[int]], gguf_file: Path, output_file: Path
) -> list[str]:
    """Write the mean squares of the inputs of all layers that have a counterpart in a GGUF file.

    Args:
        model: The checkpoint.
        rows: Token ids of training rows, `(num_rows, length)`, ragged.
        gguf_file: A GGUF file of the checkpoint, which names its tensors.
        output_file: File of NumPy arrays to write, by name of the tensor.

    Returns:
        Names of the tensors that have an importance.
    """
    names = tensor_names(gguf_file)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            squares = flat.square().sum(0).double()
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(flat)

        return add

    hooks = []
    for module_name, module in model.named_modules():
        found = names.get(f"{module_name}.weight") or names.get(f"{module_name}.weight".replace("language_model.", ""))
        if isinstance(module, nn.Linear) and found is not None:
            hooks.append(module.register_forward_pre_hook(watch(found)))
    device = next(model.parameters()).device
    try:
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    arrays: dict[str, Any] = {name: (sums[name] / counts[name]).float().cpu().numpy() for name in sums}
    with output_file.open("wb") as stream:
        np.savez(stream, **arrays)
    return sorted(arrays)


def tensor_names(gguf_file: Path) -> dict[str, str]:
    """Return the names of a checkpoint's weights, and those of their counterparts in a GGUF file of it."""
    import gguf  # slow to import

    reader = gguf.GGUFReader(gguf_file)
    architecture = _value(reader, "general.architecture")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return {}
    num_blocks = int(_value(reader, f"{architecture}.block_count"))
    table = gguf.get_tensor_name_map(known[architecture], num_blocks).mapping
    there = {tensor.name for tensor in reader.tensors}
    return {f"{name}.weight": f"{found[1]}.weight" for name, found in table.items() if f"{found[1]}.weight" in there}


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
