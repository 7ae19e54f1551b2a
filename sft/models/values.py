"""Values of weights: checks that those of a base model and of an adapter are finite numbers of a floating point type.

One value that is not a number makes every loss and every gradient that, and a merge writes it into the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft.models.checkpoint import WAY_OUT, CheckpointError, weight_files
from sft.untrusted.patterns import PatternError, fullmatches

_CHUNK = 1 << 26
"""Values that are looked at together, so that a type without a minimum of its own is converted in parts."""


def check_values(model: torch.nn.Module, place: str | Path) -> None:
    """Check that all floating point parameters of a loaded model are finite; quantized values and empty ones pass.

    Args:
        model: The model.
        place: Folder or hub id that it was loaded from, for the message.

    Raises:
        CheckpointError: A parameter has values that are not; the message names it and its file.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta" and not is_finite(parameter.detach()):
            found = _not_finite_in(weight_files(Path(place))) if Path(place).is_dir() else None
            where = f"{found[1]} in {found[0]}" if found is not None else f"{name} of {str(place)!r}"
            raise CheckpointError(f"The weight {where} has values that are NaN or infinite. {WAY_OUT}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values of a floating point tensor are finite; reads it once and copies none of it."""
    if tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:
        values = tensor.reshape(-1).split(_CHUNK)
        return all(bool(part.float().isfinite().all()) for part in values)
    # both are NaN if any value is
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite()) and bool(high.isfinite())


def _not_finite_in(files: Iterable[Path]) -> tuple[Path, str] | None:
    """Return the file and name of the first tensor with values that are not finite."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not is_finite(tensor):
                    return file, name
    return None


def check_adapter_values(file: Path) -> None:
    """Check that all tensors of an adapter's file are finite numbers of a floating point type.

    Raises:
        CheckpointError: One is not; the message names it and the file.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if name.endswith("_topk_indices"):  # of VB-LoRA, which saves which vectors it uses
                    continue
                if not tensor.is_floating_point():
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise CheckpointError(
                        f"The weight {name} in {file} is of the type {kind}, and weights of an adapter are floating "
                        "point numbers. Save the adapter anew, or copy it again."
                    )
                if not is_finite(tensor):
                    raise CheckpointError(
                        f"The weight {name} in {file} has values that are NaN or infinite: its training diverged, or "
                        "the file is damaged. Train it anew, or copy it again."
                    )
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut off: {error}. Copy the adapter again.") from error


def check_adapter_config(folder: Path, config: Any, module_names: Iterable[str], shapes: Iterable[list[int]]) -> None:
    """Check that the expressions of an adapter end in time on the names of modules, and that its ranks fit its file.

    Args:
        folder: Folder of the adapter.
        config: Its peft configuration.
        module_names: Names of all modules of the base model.
        shapes: Shapes of the weights in the adapter's file.

    Raises:
        CheckpointError: An expression takes too long, or can't be compiled; a pattern option is not a map; or a rank is
            larger than any weight.
    """
    names = list(module_names)
    patterns: dict[str, tuple[str, str]] = {}
    for option in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "trainable_token_indices"):
        if isinstance(value := getattr(config, option, None), str):
            patterns[option] = (value, value)
    for option in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, option, None) or {}
        if not isinstance(values, dict):
            raise CheckpointError(
                f"The adapter in {folder} can't be used: {option} is {values!r:.80} in its adapter_config.json, and "
                "must map patterns of module names to numbers. Copy the adapter again."
            )
        for key in values:
            patterns[f"{option} {key!r:.60}"] = (str(key), rf"(.*\.)?({key})$")  # as peft matches it
    for option, (shown, pattern) in patterns.items():
        try:
            fullmatches(pattern, names)
        except PatternError as error:
            raise CheckpointError(
                f"The adapter in {folder} can't be used: {option} is {shown!r:.80} in its adapter_config.json, and "
                f"{error}. State the modules by a list of their names."
            ) from None
    if getattr(getattr(config, "peft_type", None), "value", None) != "LORA":
        return  # a rank beyond all sizes means full matrices in LoKr
    largest = max((size for shape in shapes for size in shape), default=0)
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    for rank in ranks:
        if isinstance(rank, int) and rank > largest > 0:
            raise CheckpointError(
                f"The adapter in {folder} can't be used: its adapter_config.json states the rank {rank}, and no weight "
                f"in its file has more than {largest} rows or columns. Copy the adapter again."
            )


def read_adapter_config(folder: Path, name: str) -> None:
    """Check that the configuration of an adapter is a JSON object that can be read.

    Raises:
        CheckpointError: It is not.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{folder / name} is not valid JSON ({reason}). Copy the adapter again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} is not a JSON object. Copy the adapter again.")
