"""Checks of model and calibration rows before a quantization, and the report that all quantization methods share.

Torch is imported inside functions: validating the parameters must not load it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft.models.checkpoint import empty_model, is_image_model, weight_files

VALUES_PER_WORD = {2: 16, 3: 32, 4: 8, 8: 4}
"""Width in bits -> smallest number of weights that fill 32-bit words; 32 weights of 3 bits fill three words."""

GROUP_SIZES = (32, 64, 128)
"""Group sizes that all readers support (besides -1): torch's CPU kernel rejects 16, vLLM everything above 128."""

CPU_GROUPS = (32, 64, 128, 256)
"""Group sizes of torch's CPU kernel for 4-bit weights."""

MAX_NAMED = 5
"""Number of rows and of token ids that a message lists."""

MIN_ROW_TOKENS = 11
"""GPTQModel silently skips rows of ten tokens or fewer."""

MAX_SMALL_SHARE = 0.05
"""Largest fraction of the linear layers' weights that may be left in half precision because they can't be packed."""
NOT_FOR_IMAGES = (
    "the model has an image tower, and GPTQ is done for models of text alone; use int8 or nf4, which keep the image "
    "tower in half precision, or none"
)
"""Why GPTQ refuses a vision-language model."""

NOT_FOR_EXPERTS = {
    "gptq": "in a GPTQ checkpoint each expert is a layer, and transformers would not find them",
    "int8": "bitsandbytes quantizes layers alone, and would leave them in half precision",
    "nf4": "bitsandbytes quantizes layers alone, and would leave them in half precision",
}
"""Method -> why it refuses experts that are not layers."""

SUMMARY = ("size_ratio", "mean_relative_error", "max_relative_error")
"""Names of the derived figures in the report."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text)."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Error of one quantized linear layer: `|W - Wq| / |W|` in the Frobenius norm, comparable between layers."""

    layer: int
    module: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Result of a quantization.

    Args:
        source_bytes: Size of the plain weight files.
        quantized_bytes: Size of the quantized weight files.
        modules: One error per quantized layer.
        loading_deviation: Mean absolute difference between the logits of the folder as transformers loads it and those
            of the quantized model that was written, divided by the standard deviation of the latter.
    """

    source_bytes: int
    quantized_bytes: int
    modules: tuple[LayerError, ...]
    loading_deviation: float

    @property
    def size_ratio(self) -> float:
        """Quantized size divided by source size."""
        return self.quantized_bytes / self.source_bytes

    @property
    def mean_relative_error(self) -> float:
        """Mean of `relative_error` over the modules."""
        return sum(module.relative_error for module in self.modules) / len(self.modules)

    @property
    def max_relative_error(self) -> float:
        """Largest `relative_error` of the modules."""
        return max(module.relative_error for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived figures as plain JSON values."""
        return {**asdict(self), **{name: getattr(self, name) for name in SUMMARY}}


def select_calibration(rows: Sequence[Sequence[int]], num_rows: int, length: int, seed: int) -> list[list[int]]:
    """Choose calibration rows at random, the same ones for the same seed, each truncated to `length` tokens.

    Args:
        rows: Token ids of the training rows, `(num_rows, length)`, ragged.
        num_rows: Number of rows to choose. If fewer are long enough, all of those are returned, shuffled.
        length: Largest number of tokens per row.
        seed: Seed of the choice.

    Raises:
        ValueError: No row is long enough, or `num_rows` or `length` is too small.
    """
    if num_rows < 1 or length < MIN_ROW_TOKENS:
        raise ValueError(
            f"calibration needs at least one row of {MIN_ROW_TOKENS} tokens, got {num_rows} rows of {length}"
        )
    usable = [index for index, row in enumerate(rows) if len(row) >= MIN_ROW_TOKENS]
    if not usable:
        raise ValueError(
            f"none of the {len(rows)} training rows has the {MIN_ROW_TOKENS} tokens that a calibration row needs"
        )
    chosen = random.Random(seed).sample(usable, min(num_rows, len(usable)))
    return [list(rows[index][:length]) for index in chosen]


def check_calibration(model_dir: Path, calibration: Sequence[Sequence[int]]) -> None:
    """Check that there are calibration rows, long enough and without token ids outside of the vocabulary.

    Raises:
        ValueError: They are not; the message names the row, the position and the id.
    """
    if not calibration:
        raise ValueError("calibration is empty: quantization needs rows of token ids like those the model will see")
    vocab_size = _text_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))["vocab_size"]
    for index, row in enumerate(calibration):
        if len(row) < MIN_ROW_TOKENS:
            raise ValueError(f"calibration row {index} has {len(row)} tokens, at least {MIN_ROW_TOKENS} are needed")
        for position, token in enumerate(row):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"calibration row {index} has token id {token} at position {position}, but the ids of the model "
                    f"are 0 to {vocab_size - 1}: were the rows packed with another tokenizer?"
                )


def describe_poison(model_dir: Path, calibration: Sequence[Sequence[int]]) -> str | None:
    """Describe which calibration rows the plain model gives NaN or Inf on, and which single tokens cause it.

    It needs a forward pass of the plain model on each row, and is called only when a quantization has failed.

    Returns:
        One sentence; None if all logits are finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sft.export.proof import iterate_logits

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = [index for index, row in enumerate(iterate_logits(model, calibration)) if not row.isfinite().all()]
    if not found:
        return None
    tokens = sorted({token for index in found for token in calibration[index]})
    alone = [
        token
        for token, row in zip(tokens, iterate_logits(model, [[t] for t in tokens]), strict=True)
        if not row.isfinite().all()
    ]
    rows = ", ".join(map(str, found[:MAX_NAMED]))
    because = (
        f"the embeddings of token ids {', '.join(map(str, alone[:MAX_NAMED]))} cause it"
        if alone
        else "no single token causes it, look for weights that are too large"
    )
    return (
        f"the model gives NaN or Inf on {len(found)} of {len(calibration)} calibration rows (number {rows}) before "
        f"anything is quantized: {because}"
    )


def check_weights_finite(model_dir: Path) -> None:
    """Check that no weight is NaN or Inf: GPTQ would turn such weights into wrong ones that look plausible.

    Raises:
        ValueError: Some weights are, or there is no weight file; the message names the tensors or the folder.
    """
    from safetensors import safe_open

    files = weight_files(model_dir)
    if not files:
        raise ValueError(f"{model_dir} holds no .safetensors file: give a plain merged checkpoint folder")
    broken = []
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in sorted(handle.keys()):
                tensor = handle.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    broken.append(f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()})")
    if broken:
        raise ValueError(f"{model_dir} has NaN or Inf in {len(broken)} tensors: {'; '.join(broken[:5])}")


def check_layers_fit(model_dir: Path, bits: int, group_size: int, device: str = "cpu", sym: bool = True) -> None:
    """Check that bits and group size fit the linear layers, and that transformers can load such layers.

    GPTQModel itself would write a checkpoint whose last group is smaller, which standard readers misread.

    Raises:
        ValueError: They do not; the message names the first such layer, its width and the group sizes that fit all
            layers.
    """
    if bits not in VALUES_PER_WORD:
        raise ValueError(f"bits is {bits}, but GPTQ supports {', '.join(map(str, VALUES_PER_WORD))}")
    if is_image_model(model_dir):
        raise ValueError(f"{model_dir}: {NOT_FOR_IMAGES}")
    model = empty_model(model_dir)
    layers = linear_layers(model)
    _check_loadable(model_dir, layers)
    check_experts(model, model_dir, "gptq")
    if (bits, group_size, sym, device) == (4, -1, False, "cpu"):
        raise ValueError(
            "torch's kernel for CPUs misreads asymmetric 4-bit rows without groups: use sym: true, or a group_size of "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    widths = linear_widths(model)
    if not widths:
        raise ValueError(f"{model_dir} has no linear layer to quantize")
    if group_size != -1 and group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, but readers support -1 and {', '.join(map(str, GROUP_SIZES))}")
    problems = _layer_problems(widths, bits, group_size, device)
    if _num_weights(widths, problems) > MAX_SMALL_SHARE * _num_weights(widths, widths):
        raise ValueError(next(iter(problems.values())))


def small_layers(model_dir: Path, bits: int, group_size: int, device: str = "cpu") -> list[str]:
    """Return the linear layers that bits and group size do not fit, and that are left in half precision.

    They are small: those of gates, with one output per head. `check_layers_fit` refuses if they hold more than
    `MAX_SMALL_SHARE` of the weights.
    """
    return list(_layer_problems(linear_widths(empty_model(model_dir)), bits, group_size, device))


def _num_weights(widths: dict[str, tuple[int, int]], names: Iterable[str]) -> int:
    return sum(widths[name][0] * widths[name][1] for name in names)


def _layer_problems(widths: dict[str, tuple[int, int]], bits: int, group_size: int, device: str) -> dict[str, str]:
    """Return why bits or group size do not fit a layer, by its name; layers that they fit are missing."""
    found = {}
    for name, (width, outputs) in widths.items():
        problem = _group_problem(width, bits, group_size, device)
        if problem:
            fitting = [str(size) for size in GROUP_SIZES if all(inputs % size == 0 for inputs, _ in widths.values())]
            found[name] = (
                f"{problem} of {name}; sizes that fit: {', '.join(fitting) or 'none, quantize on a GPU with -1'}"
            )
        for what, size in (("input", width), ("output", outputs)):
            if size % VALUES_PER_WORD[bits] and name not in found:
                found[name] = (
                    f"{bits}-bit weights are packed by {VALUES_PER_WORD[bits]}, which does not divide the {what} "
                    f"width {size} of {name}; try other bits"
                )
    return found


def _group_problem(width: int, bits: int, group_size: int, device: str) -> str:
    if group_size != -1 and width % group_size:
        return f"group_size {group_size} does not divide the width {width}"
    if group_size == -1 and bits == 4 and device == "cpu" and width not in CPU_GROUPS:
        known = ", ".join(map(str, CPU_GROUPS))
        return f"on a CPU torch runs 4-bit groups of {known}, but group_size -1 makes one group of the width {width}"
    return ""


def linear_widths(model: Any) -> dict[str, tuple[int, int]]:
    """Return input and output width of each layer of `linear_layers`, by name."""
    return {name: _widths(layer) for name, layer in linear_layers(model).items()}


def linear_layers(model: Any) -> dict[str, Any]:
    """Return each linear layer but head and routers, by name.

    Layers outside of the language model, such as those of an image tower, are not quantized and not listed.

    Args:
        model: Model, with weights or from `empty_model`.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from sft.inner_model import is_inside, outside_language_model
    from sft.models.weight_kinds import router_layers

    head, routers, others = model.get_output_embeddings(), router_layers(model), outside_language_model(model)
    kinds = (torch.nn.Linear, Conv1D)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and name not in routers and not is_inside(name, others)
    }


def _widths(layer: Any) -> tuple[int, int]:
    import torch

    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]  # Conv1D keeps its weight as (inputs, outputs)


def _check_loadable(model_dir: Path, layers: dict[str, Any]) -> None:
    # transformers initializes GPT-2's Conv1D layers through their `weight`, which a GPTQ layer does not have.
    from transformers.pytorch_utils import Conv1D

    found = [name for name, layer in layers.items() if isinstance(layer, Conv1D)]
    if found:
        raise ValueError(
            f"{found[0]} of {model_dir} is a Conv1D, as in GPT-2, and transformers cannot load such a model from a "
            "GPTQ checkpoint; use int8 or nf4"
        )


def check_experts(model: Any, model_dir: Path, method: str) -> None:
    """Check that the experts of a mixture are layers, which a method quantizes, and not parameters of another module.

    Args:
        model: Model, with weights or from `empty_model`.
        model_dir: Its folder, for the message.
        method: gptq, int8 or nf4.

    Raises:
        ValueError: They are not; the message says which share of the weights they have.
    """
    from torch import nn

    from sft.models.weight_kinds import as_percent, is_expert, matrices_outside_layers, num_values

    found = [weight for weight in matrices_outside_layers(model) if is_expert(weight)]
    experts = [weight for weight in found if not isinstance(weight.owner, nn.Linear)]
    if experts:
        share = as_percent(sum(num_values(each.parameter) for each in experts), model.num_parameters())
        names = sorted({".".join(str(each.name).split(".")[-2:]) for each in experts})
        raise ValueError(
            f"{share} of the weights of {model_dir} are experts ({', '.join(names[:MAX_NAMED])}), which are parameters "
            f"of {type(model).__name__} and not layers: {NOT_FOR_EXPERTS[method]}. Use method none"
        )


def pick_device(name: str) -> str:
    """Return the device for a name; "auto" is a GPU if there is one."""
    import torch

    if name != "auto":
        return name
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _text_config(config: dict) -> dict:
    return config.get("text_config", config) if "vocab_size" not in config else config
