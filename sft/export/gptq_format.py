"""File format of GPTQ checkpoints: unpacking of weights, and cleanup of the files that GPTQModel saves.

Layout (defined by AutoGPTQ, read by vLLM and transformers) of a layer with `inputs` and `outputs`:
`qweight` int32 `(inputs * bits / 32, outputs)`, packed down the input axis;
`qzeros` int32 `(groups, outputs * bits / 32)`, packed along the outputs, minus one in format "gptq" (not "gptq_v2");
`scales` float16 `(groups, outputs)`; `g_idx` int32 `(inputs,)`, the group of every input column.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sft.models.checkpoint import empty_model, weight_files

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Names of the tensors of a packed layer."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def weights_size_bytes(model_dir: Path) -> int:
    """Return the size of the weight files of a checkpoint folder."""
    return sum(path.stat().st_size for path in weight_files(model_dir))


def finish_checkpoint(model_dir: Path, quantized_dir: Path) -> list[str]:
    """Save unquantized tensors in half precision, and restore config, tokenizer and generation config of the source.

    GPTQModel changes the generation config (it turns sampling on), and writes timings and temporary paths into the
    folder, which would give each run a different digest.

    Args:
        model_dir: Folder of the source checkpoint.
        quantized_dir: Folder that GPTQModel has saved; changed in place.

    Returns:
        Names of tensors with values beyond float16's range, which were left as they were.

    Raises:
        ValueError: GPTQModel left layers unpacked that readers can't tell from packed ones.
    """
    kept: list[str] = []
    for path in weight_files(quantized_dir):
        kept += _halve_file(path)
    quantization = _stable_quantization_config(quantized_dir) | _packed_modules(model_dir, quantized_dir)
    for path in quantized_dir.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            path.unlink()
    for path in model_dir.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, quantized_dir / path.name)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config |= {"dtype": "float16", "quantization_config": quantization}
    _write_json(quantized_dir / "config.json", config)
    # vLLM reads this file, transformers the section in config.json.
    _write_json(quantized_dir / "quantize_config.json", quantization)
    return kept


def _packed_modules(model_dir: Path, quantized_dir: Path) -> dict[str, list[list[str]]]:
    """Return which layers of a block are packed, as transformers and vLLM read it; empty if all are.

    Without it, transformers takes every linear layer of a block for a packed one.
    """
    packed = {name for name, _ in packed_layers(quantized_dir)}
    model = empty_model(model_dir)
    head = model.get_output_embeddings()
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    unpacked = linear - packed
    if not unpacked:
        return {}
    inside = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in packed})
    ambiguous = sorted(name for name in unpacked if name.endswith(tuple(inside)))
    if ambiguous:
        raise ValueError(
            f"GPTQModel left {ambiguous[0]} unpacked, which readers can't tell from the packed layers "
            f"{', '.join(inside)}; use int8 or nf4"
        )
    return {"modules_in_block_to_quantize": [inside]}


def weight_errors(model_dir: Path, quantized_dir: Path) -> dict[str, float]:
    """Return the relative Frobenius error `|W - Wq| / |W|` of each quantized layer, by its name in the checkpoint.

    Raises:
        ValueError: A quantized layer has a scale that is NaN or Inf.
    """
    config = json.loads((quantized_dir / "quantize_config.json").read_text(encoding="utf-8"))
    errors = {}
    with open_tensors(model_dir) as sources:
        for name, packed in packed_layers(quantized_dir):
            if not packed["scales"].isfinite().all():
                raise ValueError(
                    f"quantized layer {name} has scales beyond float16's range; its weights are too large for GPTQ"
                )
            weight = sources[f"{name}.weight"].get_tensor(f"{name}.weight").float()
            restored = dequantize(packed, config["bits"], zeros_minus_one=config["checkpoint_format"] == "gptq")
            # Conv1D layers store their weight as (inputs, outputs) already.
            reference = weight if weight.shape == restored.shape and weight.shape[0] != weight.shape[1] else weight.T
            errors[name] = float((reference - restored).norm() / reference.norm().clamp_min(1e-12))
    return errors


def packed_layers(quantized_dir: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the name and the packed tensors (see `PARTS`) of each quantized layer."""
    with open_tensors(quantized_dir) as places:
        for name in places:
            if name.endswith(".qweight"):
                layer = name.removesuffix(".qweight")
                tensors = {part: places[f"{layer}.{part}"].get_tensor(f"{layer}.{part}") for part in PARTS}
                yield layer, tensors


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each tensor name -> its open safetensors file: opening a file takes longer than reading a small tensor."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
        yield {name: file for file in files for name in sorted(file.keys())}


def dequantize(packed: dict[str, torch.Tensor], bits: int, zeros_minus_one: bool = True) -> torch.Tensor:
    """Return the weight `(inputs, outputs)` of a packed layer in float32.

    Args:
        packed: Tensors of the layer by name, see `PARTS`.
        bits: Width of a weight.
        zeros_minus_one: Whether the zero points are stored minus one, as in the format "gptq".
    """
    levels = _unpack(packed["qweight"], bits, axis=0)
    zeros = _unpack(packed["qzeros"], bits, axis=1) + int(zeros_minus_one)
    group = packed["g_idx"].long()
    return (levels - zeros[group]).float().mul_(packed["scales"].float()[group])


def _unpack(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Unpack integers of `bits` bits from a matrix of int32 words along one axis, least significant bits first."""
    if 32 % bits == 0:
        # The mask removes the sign bits that the arithmetic shift adds on the left.
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        shifts = shifts.view(-1, 1) if axis == 0 else shifts
        return ((words.unsqueeze(axis + 1) >> shifts) & (2**bits - 1)).flatten(axis, axis + 1)
    # Three-bit values cross word boundaries, so the bits are taken one by one.
    wide = words.movedim(axis, -1).to(torch.int64) & 0xFFFFFFFF
    stream = ((wide.unsqueeze(-1) >> torch.arange(32)) & 1).flatten(-2)
    fields = stream.unflatten(-1, (-1, bits))
    return (fields << torch.arange(bits)).sum(-1).movedim(-1, axis)


def _halve_file(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    kept = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype == torch.float16:
            continue
        half = tensor.to(torch.float16)
        if half.isfinite().all():
            tensors[name] = half
        else:
            kept.append(name)
    save_file(tensors, path, metadata={"format": "pt"})
    return kept


def _stable_quantization_config(quantized_dir: Path) -> dict[str, Any]:
    config = json.loads((quantized_dir / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    meta = config.get("meta", {})
    config["meta"] = {key: value for key, value in meta.items() if "offload" not in key and "device" not in key}
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
