"""GPTQ quantization to 2, 3, 4 or 8 bits (Frantar et al., arXiv:2210.17323) with GPTQModel, on a CPU or GPU.

The checkpoint loads with plain `AutoModelForCausalLM.from_pretrained` and has the layout that vLLM expects. In addition
to GPTQModel: weights and calibration rows are checked before the long computation, a layer that cannot be calibrated is
an error instead of a silent round-to-nearest, the written checkpoint is loaded and compared, and two runs on the same
input write the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sft.export.gptq_format import (
    PARTS,
    dequantize,
    finish_checkpoint,
    open_tensors,
    packed_layers,
    weight_errors,
    weights_size_bytes,
)
from sft.export.quantization import (
    LayerError,
    Progress,
    QuantizationReport,
    check_calibration,
    check_layers_fit,
    check_weights_finite,
    describe_poison,
    pick_device,
    small_layers,
)
from sft.folders import replacing_folder

TOKENS_PER_BATCH = 2048

UNSOLVED_LOSS = 1e8
"""GPTQModel reports 999999999 as the loss of a module whose Hessian it could not invert at any damping."""

MAX_COMPARED_TOKENS = 64

MAX_DEVIATION = 0.25
"""Largest accepted mean difference of logits over their standard deviation, between loaded and dequantized model."""


@dataclass(frozen=True)
class GPTQSettings:
    """Settings of a quantization; the names are those of GPTQModel's `QuantizeConfig`.

    Args:
        bits: Width of a weight: 2, 3, 4 or 8.
        group_size: Number of input columns that share a scale. It must divide the input width of each layer. -1: one
            group per row.
        sym: Whether values are symmetric around zero, which the fast kernels need.
        desc_act: Whether to quantize the columns with large activations first. Slower to run, mostly better at 2 and
            3 bits.
        damp_percent: Share of the mean Hessian diagonal that is added to the diagonal.
        damp_auto_increment: Step by which the damping grows, up to 1, while a Hessian has no Cholesky factor.
        true_sequential: Whether to calibrate the parts of a block one after another, each with the errors of the
            earlier ones. It takes two and a half times as many forward passes; at 4 bits the errors were the same
            without it (0.134 either way).
        mse: Exponent of the error that a search for the best scale of each group minimizes, such as 2.4; 0 = no search:
            the scale covers the largest weight.
        more: Further options of `QuantizeConfig`, such as `{"gptaq": GPTAQConfig()}`.
        device: "auto" (a GPU if there is one), "cpu", "cuda:0", ...
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.05
    damp_auto_increment: float = 0.01
    true_sequential: bool = False
    mse: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ModuleError(LayerError):
    """Result of GPTQ for one linear layer.

    Args:
        loss: GPTQ's own objective: squared error of the layer's output per calibration sample.
        damp: Damping that was needed.
        num_samples: Number of calibration samples.
    """

    loss: float
    damp: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class QuantizeReport(QuantizationReport):
    """Result of `quantize_gptq`; `loading_deviation` is the result of the function of that name."""

    settings: GPTQSettings
    num_rows: int
    num_distinct_rows: int
    num_tokens: int
    modules: tuple[ModuleError, ...]
    kept_full_precision: tuple[str, ...]

    @property
    def num_damping_retries(self) -> int:
        """Number of modules that needed more damping than the settings ask for."""
        return sum(m.damp > self.settings.damp_percent + 1e-9 for m in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived figures as plain JSON values."""
        return {**super().to_dict(), "num_damping_retries": self.num_damping_retries}


def quantize_gptq(
    model_dir: str | Path,
    output_dir: str | Path,
    calibration: Sequence[Sequence[int]],
    settings: GPTQSettings | None = None,
    on_progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a plain checkpoint folder and write a GPTQ checkpoint folder, with tokenizer and generation config.

    Args:
        model_dir: Folder with `config.json` and safetensors.
        output_dir: Folder to write. An existing one is replaced when everything has succeeded.
        calibration: Token ids of the calibration rows, `(num_rows, length)`, ragged.
        settings: See `GPTQSettings`.
        on_progress: Called with (done, total, text) at the beginning and after each transformer block.

    Returns:
        Sizes, and one error record per quantized layer.

    Raises:
        ValueError: The weights contain NaN or Inf, a calibration id is outside the vocabulary, bits or group size do
            not fit a layer, the Hessian of a layer is singular at full damping, the model gives NaN on a calibration
            row, or the written checkpoint loads as a different model.
    """
    model_dir, output_dir = Path(model_dir).resolve(), Path(output_dir).resolve()
    settings = settings or GPTQSettings()
    device = pick_device(settings.device)
    check_layers_fit(model_dir, settings.bits, settings.group_size, device, settings.sym)
    check_calibration(model_dir, calibration)
    check_weights_finite(model_dir)
    with replacing_folder(output_dir) as raw_dir, tempfile.TemporaryDirectory() as work:
        with _naming_bad_rows(model_dir, calibration):
            rows = _run_gptqmodel(model_dir, raw_dir, Path(work), calibration, settings, on_progress)
            kept = finish_checkpoint(model_dir, raw_dir)
            errors = weight_errors(model_dir, raw_dir)
            with _output_captured(Path(work)):
                deviation = loading_deviation(raw_dir, calibration[0])
        return QuantizeReport(
            settings=settings,
            num_rows=len(calibration),
            num_distinct_rows=len({tuple(row) for row in calibration}),
            num_tokens=sum(len(row) for row in calibration),
            source_bytes=weights_size_bytes(model_dir),
            quantized_bytes=weights_size_bytes(raw_dir),
            modules=tuple(_module_error(row, errors) for row in rows),
            kept_full_precision=tuple(kept),
            loading_deviation=deviation,
        )


def load_dequantized(quantized_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a GPTQ checkpoint as a plain model, with its quantized weights unpacked to `dtype`.

    The values are exactly those of the packed weights, but matrix products run at full speed on a CPU, where the packed
    kernel takes four times as long. The model is meant for evaluation; it saves no memory.
    """
    config = AutoConfig.from_pretrained(quantized_dir)
    # The file that vLLM reads; transformers reads the section in config.json.
    packing = json.loads((quantized_dir / "quantize_config.json").read_text(encoding="utf-8"))
    del config.quantization_config
    with no_init_weights():  # all weights are read below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {}
    for name, packed in packed_layers(quantized_dir):
        weight = dequantize(packed, packing["bits"], zeros_minus_one=packing["checkpoint_format"] == "gptq")
        is_linear = isinstance(model.get_submodule(name), torch.nn.Linear)
        weights[f"{name}.weight"] = (weight.T if is_linear else weight).to(dtype).contiguous()
    packed_parts = {name.removesuffix("weight") + part for name in weights for part in PARTS}
    with open_tensors(quantized_dir) as places:
        for name, file in places.items():
            if name not in packed_parts:
                weights[name] = file.get_tensor(name).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    unknown = [*(set(missing) - set(model.all_tied_weights_keys or ())), *unexpected]
    assert not unknown, f"the checkpoint and the architecture differ in {unknown}"
    if (quantized_dir / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(quantized_dir)
    return model.eval()


@torch.inference_mode()
def loading_deviation(quantized_dir: Path, input_ids: Sequence[int]) -> float:
    """Compare a GPTQ checkpoint as `from_pretrained` loads it with its dequantized weights.

    Args:
        quantized_dir: Folder of the checkpoint.
        input_ids: Tokens of a typical text, `(length,)`; the first `MAX_COMPARED_TOKENS` are used.

    Returns:
        Mean absolute difference of the logits over their standard deviation. Rounding in the packed kernel causes about
        0.01.

    Raises:
        ValueError: The difference is too large for rounding: users would get a different model than the one that was
            quantized.
    """
    ids = torch.tensor([list(input_ids[:MAX_COMPARED_TOKENS])])
    expected = load_dequantized(quantized_dir)(input_ids=ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=torch.float32)
    # At other widths than 4 bits the kernel is compiled, which takes longer than this pass and needs a C++ compiler.
    with torch.compiler.set_stance("force_eager"):
        logits = loaded(input_ids=ids.to(loaded.device)).logits.to("cpu")
    deviation = float((logits - expected).abs().mean() / expected.std())
    if not deviation <= MAX_DEVIATION:
        raise ValueError(
            f"loaded by transformers, {quantized_dir} gives wrong logits: they differ from those of its dequantized "
            f"weights by {deviation:.3f} standard deviations, {MAX_DEVIATION} is the limit; try another group_size or "
            "bits"
        )
    return deviation


def _run_gptqmodel(
    model_dir: Path,
    raw_dir: Path,
    work: Path,
    calibration: Sequence[Sequence[int]],
    settings: GPTQSettings,
    on_progress: Progress | None,
) -> list[dict[str, Any]]:
    # GPTQModel reads this at import to size its thread pools. Its default fails on a machine with two cores, where it
    # asks a pool of one worker for two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))
    with _output_captured(work):
        from gptqmodel import GPTQModel, QuantizeConfig

        device = pick_device(settings.device)
        small = small_layers(model_dir, settings.bits, settings.group_size, device)
        config = QuantizeConfig(
            bits=settings.bits,
            group_size=settings.group_size,
            sym=settings.sym,
            desc_act=settings.desc_act,
            damp_percent=settings.damp_percent,
            damp_auto_increment=settings.damp_auto_increment,
            true_sequential=settings.true_sequential,
            mse=settings.mse,
            device=device,
            # "-:" leaves a layer as it is
            dynamic={f"-:^{re.escape(name)}$": {} for name in small} or None,
            act_group_aware=settings.group_size != -1 and not settings.desc_act,
            # The format "gptq" stores zero points minus one, and so cannot store a zero point of 0, which only
            # asymmetric weights have.
            format="gptq" if settings.sym else "gptq_v2",
            # The default silently falls back to round-to-nearest; None makes it fail.
            fallback=None,
            # Packs the same bytes as the default, but without compiling a C++ extension at first use.
            pack_impl="original",
            offload_to_disk=False,
            **settings.more,
        )
        dtype = torch.float32 if device == "cpu" else "auto"
        model = GPTQModel.load(str(model_dir), config, dtype=dtype)
        model.layer_callback = _LayerProgress(on_progress, model.model.config.num_hidden_layers)
        if on_progress is not None:
            on_progress(0, model.model.config.num_hidden_layers, f"{len(calibration)} calibration rows")
        rows = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in calibration]
        with _thread_failures_raised():
            log = model.quantize(rows, batch_size=max(1, TOKENS_PER_BATCH // max(map(len, calibration))))
            model.save(str(raw_dir))
    return _solved_rows(log)


@contextlib.contextmanager
def _output_captured(work: Path) -> Iterator[None]:
    """Run in the folder `work`, where GPTQModel writes its `logs/`, with its console output in a file there."""
    with (
        (work / "gptqmodel.log").open("a", encoding="utf-8") as log,
        contextlib.chdir(work),
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


@contextlib.contextmanager
def _naming_bad_rows(model_dir: Path, calibration: Sequence[Sequence[int]]) -> Iterator[None]:
    """Add to the error of a failed quantization which calibration rows the plain model gives NaN or Inf on, if any."""
    try:
        yield
    except ValueError as error:
        poison = describe_poison(model_dir, calibration)
        if poison is None:
            raise
        raise ValueError(f"{poison}. {error}") from error


@contextlib.contextmanager
def _thread_failures_raised() -> Iterator[None]:
    """Raise exceptions of GPTQModel's worker threads in the caller; by default they end the process silently."""
    from gptqmodel.utils.threadx import _DeviceWorker

    failures: list[BaseException] = []
    abort, _DeviceWorker._abort_process = _DeviceWorker._abort_process, lambda worker, error: failures.append(error)
    try:
        yield
    finally:
        if failures:
            raise failures[0]  # the cause of whatever error the caller sees
    # Not restored after a failure: other threads may still be running, and must not end the process either.
    _DeviceWorker._abort_process = abort


class _LayerProgress:
    """Callback of GPTQModel that reports each transformer block once."""

    def __init__(self, on_progress: Progress | None, num_layers: int) -> None:
        self.on_progress, self.num_layers, self.done = on_progress, num_layers, set[int]()

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
        if self.on_progress is None or layer_idx in self.done:
            return
        self.done.add(layer_idx)
        self.on_progress(len(self.done), self.num_layers, f"block {layer_idx} quantized")


def _solved_rows(log: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = [row for name in sorted(log) for row in log[name]]
    failed = [f"layer {r['layer']} {r['module']} (loss {r['loss']})" for r in rows if not _is_solved(str(r["loss"]))]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(rows)} layers could not be quantized, as their Hessian has no inverse at any "
            f"damping: {'; '.join(failed[:5])}. Calibrate on more or longer rows, or look for constant or very large "
            "activations."
        )
    # Modules finish in the order in which their threads do.
    return sorted(rows, key=_layer_and_module)


def _is_solved(loss: str) -> bool:
    try:
        return float(loss) < UNSOLVED_LOSS
    except ValueError:
        return False


def _layer_and_module(row: dict[str, Any]) -> tuple[int, str]:
    return int(row["layer"]), str(row["module"])


def _module_error(row: dict[str, Any], errors: dict[str, float]) -> ModuleError:
    layer, module = _layer_and_module(row)
    names = [name for name in errors if f".{layer}.{module}." in f".{name}."]
    assert len(names) == 1, f"layer {layer} {module} matches {names} in the checkpoint"
    return ModuleError(
        layer=layer,
        module=module,
        loss=float(row["loss"]),
        relative_error=errors[names[0]],
        damp=float(row["damp"]),
        num_samples=int(row["samples"]),
    )
