"""Stage `quantize`: the merged checkpoint to a smaller one (GPTQ, int8, nf4), with errors per layer; GGUF files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from datasets import load_from_disk
from transformers import AutoConfig

from sft.export.gptq import GPTQSettings, QuantizeReport, quantize_gptq
from sft.export.quantization import MIN_ROW_TOKENS, select_calibration
from sft.llama_cpp.ollama import write_modelfile
from stages.checkout.artifacts import fresh_folder, read_jsonl, write_json
from stages.checkout.paths import Paths
from stages.engines.programs import llama_cpp
from stages.params.engines import IMPORTANCE_KINDS, GGUFKind
from stages.params.schema import Params, QuantizeSection
from stages.progress import progress, stage_progress

if TYPE_CHECKING:
    from sft.llama_cpp.export import GGUFReport

SKIPPED = "quantize.method is none: the merged checkpoint is shipped as it is"
KEPT = "kept in full precision, as half precision can't represent some of their values"
NUM_COMPARED_ROWS = 4


@stage_progress("quantize")
def run(params: Params, paths: Paths) -> None:
    """Write outs/quantize (model, report.json and, if params.yaml asks for them, GGUF files) and the figures.

    With method `none` the folder of the model is empty.
    """
    section = params.quantize
    started = time.monotonic()
    needs_rows = section.method != "none" or bool(section.export_gguf)
    rows = calibration_rows(section, paths) if needs_rows else []
    if section.method == "none":
        fresh_folder(paths.out("quantize", "model"))
        report: dict[str, Any] = {"method": "none", "reason": SKIPPED}
        measured: dict[str, float | int | str] = {"method": "none"}
        progress(1, 1, "steps", SKIPPED)
    else:
        report, measured = quantize(section, paths, rows)
    shutil.rmtree(paths.out("quantize", "gguf"), ignore_errors=True)
    if section.export_gguf:
        files = export(section.export_gguf, paths, rows)
        report["gguf"] = [file.to_dict() for file in files]
        measured |= gguf_figures(files)
    write_json(paths.out("quantize", "report.json"), report)
    write_json(paths.metrics("quantize"), measured)
    if report["method"] != "none":
        write_json(paths.timings("quantize"), {"seconds": round(time.monotonic() - started, 1)})
        print(summary(measured), flush=True)


def quantize(
    section: QuantizeSection, paths: Paths, calibration: list[list[int]]
) -> tuple[dict[str, Any], dict[str, float | int | str]]:
    """Quantize the merged model to outs/quantize/model.

    Args:
        section: Section `quantize` of params.yaml.
        paths: The checkout.
        calibration: Token ids of the calibration rows.

    Returns:
        The report, and the figures for DVC and MLflow.
    """
    merged, quantized = paths.out("merge", "model"), paths.out("quantize", "model")
    if section.method != "gptq":
        from sft.export.kbit import quantize_kbit  # imports bitsandbytes

        kbit = quantize_kbit(merged, quantized, section.method, calibration[:NUM_COMPARED_ROWS], show_step)
        return kbit.to_dict(), common_figures(kbit.to_dict())
    settings = GPTQSettings(
        bits=section.bits,
        group_size=section.group_size,
        sym=section.sym,
        desc_act=section.desc_act,
        damp_percent=section.damp_percent,
    )
    progress(0, 1, "steps", f"GPTQ on {len(calibration)} calibration rows")
    gptq = quantize_gptq(merged, quantized, calibration, settings, on_progress=show_block)
    if gptq.kept_full_precision:
        print(f"note: {KEPT}: {', '.join(gptq.kept_full_precision)}", flush=True)
    report = {"method": "gptq", **gptq.to_dict()}
    return report, figures(report, gptq)


def show_step(done: int, total: int, text: str) -> None:
    """Show a step of the rounding."""
    progress(done, total, "steps", text)


def show_block(done: int, total: int, text: str) -> None:
    """Show how many transformer blocks GPTQ has quantized."""
    progress(done, total, "blocks", text)


def export(kinds: list[GGUFKind], paths: Paths, rows: list[list[int]]) -> list[GGUFReport]:
    """Write outs/quantize/gguf/model-KIND.gguf for each kind, and the Modelfile with which Ollama serves the first.

    Args:
        kinds: Kinds of GGUF files.
        paths: The checkout.
        rows: Token ids of training rows, for the importance matrix and the comparison with the merged model.
    """
    from sft.llama_cpp.export import export_gguf  # slow to import, and most runs export no GGUF file

    merged, folder = paths.out("merge", "model"), paths.out("quantize", "gguf")
    reports = export_gguf(
        merged,
        folder,
        kinds,
        rows,
        llama_cpp(paths.root),
        by_importance=IMPORTANCE_KINDS,
        num_compared_rows=NUM_COMPARED_ROWS,
        on_step=show_step,
    )
    for report in reports:
        read = report.not_compared or f"reads back {report.deviation:.4f} deviations off"
        print(f"{folder / f'model-{report.kind}.gguf'}: {report.num_bytes / 1e6:.0f} MB, {read}", flush=True)
    note = write_modelfile(folder, f"model-{kinds[0]}.gguf", merged, held_out_chats(paths))
    if note:
        print(f"note: {note}", flush=True)
    return reports


def gguf_figures(files: list[GGUFReport]) -> dict[str, float | int | str]:
    """Return the figures of GGUF files; those that transformers does not read have a size only."""
    found: dict[str, float | int | str] = {}
    for file in files:
        found[f"gguf_{file.kind}_mb"] = file.num_bytes / 1e6
        if file.deviation is not None and file.top_token_agreement is not None:
            found[f"gguf_{file.kind}_deviation"] = file.deviation
            found[f"gguf_{file.kind}_top_token_agreement"] = file.top_token_agreement
    return found


def held_out_chats(paths: Paths) -> list[list[dict[str, Any]]]:
    """Return the messages of the held-out rows before their last answer, on which Ollama's template is checked."""
    file = paths.out("load", "eval.jsonl")
    chats = []
    for record in read_jsonl(file) if file.is_file() else ():
        messages = record.get("messages") or []
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if answers and not record.get("tools"):
            chats.append(messages[: answers[-1]])
    return chats


def calibration_rows(section: QuantizeSection, paths: Paths) -> list[list[int]]:
    """Choose the packed training rows on which GPTQ measures activations, by quantize.seed.

    Those of rows with images are without their images' tokens, since the image tower is not quantized.
    """
    train = load_from_disk(str(paths.out("pack", "train")))
    rows = train["input_ids"][:]
    if "images" in train.column_names:
        config = AutoConfig.from_pretrained(paths.out("merge", "model"))
        image_token = getattr(config, "image_token_id", None)
        rows = [[token for token in row if token != image_token] for row in rows]
    chosen = select_calibration(rows, section.num_calibration_rows, section.calibration_length, section.seed)
    if section.method == "gptq":
        num_short = sum(len(row) < MIN_ROW_TOKENS for row in rows)
        for note in calibration_notes(chosen, num_short, section.num_calibration_rows):
            print(f"note: {note}", flush=True)
    return chosen


def calibration_notes(chosen: list[list[int]], num_short: int, num_wanted: int) -> Iterator[str]:
    """Yield notes for the user where the calibration rows are few, short or equal.

    Args:
        chosen: Token ids of the calibration rows.
        num_short: Number of training rows that are too short to calibrate on.
        num_wanted: Number of calibration rows that params.yaml asks for.
    """
    if len(chosen) < num_wanted:
        yield f"{len(chosen)} calibration rows, all there are, instead of {num_wanted}"
    if num_short:
        yield f"packed training rows of fewer than {MIN_ROW_TOKENS} tokens, which calibrate nothing: {num_short}"
    num_distinct = len({tuple(row) for row in chosen})
    if num_distinct < len(chosen):
        yield f"only {num_distinct} of {len(chosen)} calibration rows differ: GPTQ fits the weights to those alone"


def common_figures(report: dict[str, Any]) -> dict[str, float | int | str]:
    """Return the figures that all methods have."""
    return {
        "method": report["method"],
        "source_mb": report["source_bytes"] / 1e6,
        "quantized_mb": report["quantized_bytes"] / 1e6,
        "size_ratio": report["size_ratio"],
        "mean_relative_error": report["mean_relative_error"],
        "max_relative_error": report["max_relative_error"],
        "loading_deviation": report["loading_deviation"],
    }


def figures(report: dict[str, Any], gptq: QuantizeReport) -> dict[str, float | int | str]:
    """Return the figures of GPTQ."""
    return {
        **common_figures(report),
        "num_damping_retries": gptq.num_damping_retries,
        "num_calibration_rows": gptq.num_rows,
        "num_distinct_calibration_rows": gptq.num_distinct_rows,
        "num_calibration_tokens": gptq.num_tokens,
    }


def summary(measured: dict[str, float | int | str]) -> str:
    """Describe the result in one line."""
    return (
        f"{measured['source_mb']:.0f} MB -> {measured['quantized_mb']:.0f} MB ({measured['size_ratio']:.1%}), "
        f"mean relative error {measured['mean_relative_error']:.3f}, worst {measured['max_relative_error']:.3f}"
    )
