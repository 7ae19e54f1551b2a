"""Quantization to 8 or 4 bits with bitsandbytes: LLM.int8 (arXiv:2208.07339) and NF4 of QLoRA (arXiv:2305.14314).

Neither needs calibration, since each block of weights is rounded separately. Plain `from_pretrained` loads the folder,
also on a CPU, if bitsandbytes is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from sft.export.gptq_format import open_tensors, weights_size_bytes
from sft.export.proof import compare_logits, logits_of
from sft.export.quantization import (
    MAX_SMALL_SHARE,
    LayerError,
    Progress,
    QuantizationReport,
    check_calibration,
    check_experts,
    check_weights_finite,
    linear_layers,
    linear_widths,
)
from sft.folders import replacing_folder
from sft.inner_model import is_inside, outside_language_model
from sft.models.checkpoint import auto_class, copy_processor_files, empty_model, save_tokenizer
from sft.models.weight_kinds import as_percent, matrices_outside_layers, num_values, router_layers

METHODS = ("int8", "nf4")
NF4_BLOCK = 64
CPU_OUTPUTS = 32
"""Number of rows of a weight that bitsandbytes' CPU kernel processes at a time."""

MAX_DEVIATION = 0.05
"""Largest accepted mean difference of logits over their standard deviation, between saved and loaded model."""

NO_BLOCK = -1
"""Number that the report gives to the block of layers that are in none."""

NUM_STEPS = 3
"""Number of calls of `on_progress`."""


@dataclass(frozen=True, kw_only=True)
class KbitReport(QuantizationReport):
    """Result of `quantize_kbit`; `method` is int8 or nf4."""

    method: str


def quantize_kbit(
    model_dir: str | Path,
    output_dir: str | Path,
    method: str,
    sample_input_ids: Sequence[Sequence[int]],
    on_progress: Progress | None = None,
) -> KbitReport:
    """Quantize the linear layers of a plain checkpoint folder and write a folder that plain transformers loads.

    Embeddings, norms, the head, routers, and the image tower, if there is one, are saved in half precision.

    Args:
        model_dir: Folder with `config.json`, safetensors and tokenizer.
        output_dir: Folder to write. An existing one is replaced when everything has succeeded.
        method: "int8", or "nf4": blocks of 64 weights with a shared scale, the scales quantized as well.
        sample_input_ids: Token ids of the rows, `(num_rows, length)`, ragged, on which the folder is compared with the
            model that was saved.
        on_progress: Called with (done, total, text) after each step.

    Raises:
        ValueError: The method is unknown or does not support the layers, see `check_layers`, the weights contain NaN
            or Inf, an id is outside the vocabulary, or the folder loads as a different model.
    """
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    plain = empty_model(model_dir)
    config = _config(method, plain)
    check_layers(model_dir, method, plain)
    check_calibration(model_dir, sample_input_ids)
    check_weights_finite(model_dir)
    check_half_precision(model_dir)
    model = _load(auto_class(AutoConfig.from_pretrained(model_dir)), model_dir, method, quantization_config=config)
    _report_progress(on_progress, 1, f"rounded to {method}")
    errors = tuple(_layer_errors(model, model_dir))
    _report_progress(on_progress, 2, f"errors of {len(errors)} layers measured")
    with replacing_folder(output_dir) as raw_dir:
        model.save_pretrained(raw_dir)
        save_tokenizer(AutoTokenizer.from_pretrained(model_dir), raw_dir)
        copy_processor_files(model_dir, raw_dir)
        deviation = _loading_deviation(model, raw_dir, method, sample_input_ids)
    _report_progress(on_progress, 3, "written and read back")
    return KbitReport(
        method=method,
        source_bytes=weights_size_bytes(model_dir),
        quantized_bytes=weights_size_bytes(output_dir),
        modules=errors,
        loading_deviation=deviation,
    )


def check_layers(model_dir: Path, method: str, plain: PreTrainedModel | None = None) -> None:
    """Check from the configuration alone that bitsandbytes quantizes the layers of a model, and can run them.

    Args:
        model_dir: Folder of the model.
        method: int8 or nf4.
        plain: What `empty_model` returns for the folder, if it was called already.

    Raises:
        ValueError: There are experts that are not layers, most layers are of a class that bitsandbytes leaves as it is,
            or nf4 can't run the widths of a layer on a CPU; the message names the first such layer.
    """
    plain = empty_model(model_dir) if plain is None else plain
    check_experts(plain, model_dir, method)
    _check_classes(plain, model_dir)
    if method != "nf4":
        return
    for name, (inputs, outputs) in linear_widths(plain).items():
        if inputs % NF4_BLOCK or outputs % CPU_OUTPUTS:
            raise ValueError(
                f"{name} has {inputs} inputs and {outputs} outputs; on a CPU nf4 needs multiples of {NF4_BLOCK} and "
                f"{CPU_OUTPUTS}: use int8 or gptq"
            )


def _check_classes(plain: PreTrainedModel, model_dir: Path) -> None:
    others = outside_language_model(plain)
    left = [weight for weight in matrices_outside_layers(plain) if not is_inside(str(weight.name), others)]
    num_left = sum(num_values(weight.parameter) for weight in left)
    known = [layer for layer in linear_layers(plain).values() if type(layer) in (torch.nn.Linear, Conv1D)]
    total = num_left + sum(layer.weight.numel() for layer in known)
    if num_left > MAX_SMALL_SHARE * total:
        raise ValueError(
            f"{as_percent(num_left, total)} of the matrices of {model_dir} ({left[0].name}, ...) are not weights of "
            f"torch.nn.Linear but of {type(left[0].owner).__name__}, and bitsandbytes would leave them in half "
            "precision. Use method none"
        )


def check_half_precision(model_dir: Path) -> None:
    """Check that all weights are within the range of half precision, in which unquantized tensors are saved.

    Raises:
        ValueError: A weight is not; the message names the first such tensor.
    """
    with open_tensors(model_dir) as places:
        for name, file in places.items():
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not tensor.half().isfinite().all():
                raise ValueError(
                    f"{name} of {model_dir} contains {float(tensor.abs().max()):.3g}, beyond the range of half "
                    "precision; use gptq, which keeps such a tensor as it is"
                )


def _config(method: str, plain: PreTrainedModel) -> BitsAndBytesConfig:
    """Return the quantization of the language model alone, without its head and routers."""
    head = plain.get_output_embeddings()
    others = outside_language_model(plain)
    heads = [name for name, module in plain.named_modules() if module is head] if others else []
    own = [*router_layers(plain), *others, *heads]
    # a list replaces transformers' own, which contains the head
    kept = [*dict.fromkeys([*get_keys_to_not_convert(plain), *own])] if own else None
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    if method == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=kept,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            # Saved in config.json, so it must not depend on the machine; float32 runs on each device.
            bnb_4bit_compute_dtype=torch.float32,
        )
    raise ValueError(f"quantization method {method!r} does not exist: use {', '.join(METHODS)}")


def _load(loader: Any, folder: Path, method: str, **options: Any) -> Any:
    """Load a model in 8 or 4 bits, and check that transformers finds all of its weights.

    Raises:
        ValueError: It does not, and they would be random; the message names some.
    """
    try:
        model, info = loader.from_pretrained(folder, dtype=torch.float16, output_loading_info=True, **options)
        missing = sorted(info["missing_keys"])
    except NotImplementedError as error:  # torch makes no random weights of 8 bits
        missing = [f"weights of 8 bits ({error})"]
    if missing:
        raise ValueError(
            f"transformers can't load all weights of this model in {method}, so that some would be random: "
            f"{', '.join(missing[:3])}. Use method none"
        )
    return model


def _report_progress(on_progress: Progress | None, done: int, text: str) -> None:
    if on_progress is not None:
        on_progress(done, NUM_STEPS, text)


def _layer_errors(model: Any, model_dir: Path) -> Iterator[LayerError]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}
    with ExitStack() as opened:
        sources = opened.enter_context(open_tensors(model_dir))
        if any(f"{name}.weight" not in sources for name in layers):  # transformers renames the weights of some families
            plain = auto_class(model.config).from_pretrained(model_dir, dtype=torch.float32)
            weights = dict(plain.named_parameters())
        else:
            weights = None
        for name, module in layers.items():
            key = f"{name}.weight"
            weight = sources[key].get_tensor(key).float() if weights is None else weights[key].detach()
            yield _layer_error(name, module, weight)


def _layer_error(name: str, module: Any, weight: torch.Tensor) -> LayerError:
    if issubclass(getattr(module, "source_cls", type(module)), Conv1D):
        weight = weight.T
    error = float((weight - _restored(module)).norm() / weight.norm().clamp_min(1e-12))
    place = re.search(r"\.(\d+)\.(.+)$", name)
    return LayerError(
        layer=int(place[1]) if place else NO_BLOCK, module=place[2] if place else name, relative_error=error
    )


def _restored(module: Linear4bit | Linear8bitLt) -> torch.Tensor:
    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state).float().cpu()
    return int8_vectorwise_dequant(weight.data, weight.SCB).float().cpu()


def _loading_deviation(model: Any, folder: Path, method: str, rows: Sequence[Sequence[int]]) -> float:
    expected = logits_of(model, rows)
    loaded = _load(auto_class(model.config), folder, method)
    difference = compare_logits(expected, logits_of(loaded, rows))
    deviation = difference.mean / float(torch.cat(expected).std())
    if not deviation <= MAX_DEVIATION:
        raise ValueError(
            "loaded by transformers, the checkpoint gives wrong logits: they differ from those of the model that was "
            f"saved by {deviation:.3f} standard deviations, {MAX_DEVIATION} is the limit"
        )
    return deviation
