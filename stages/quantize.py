"""`quantize`: the merged checkpoint -> a GPTQ checkpoint, with its error layer by layer."""

from __future__ import annotations

import time

from datasets import load_from_disk

from sft.gptq import GPTQSettings, QuantizeReport, quantize_gptq
from sft.gptq_checks import select_calibration
from stages.artifacts import fresh_folder, progress, write_json
from stages.params import Params, QuantizeSection
from stages.paths import Paths

SKIPPED = "quantize.method is none: the merged checkpoint is shipped as it is"


def run(params: Params, paths: Paths) -> None:
    """Write outs/quantize/model, outs/quantize/report.json and the figures; method `none` only says that it skips."""
    section = params.quantize
    started = time.monotonic()
    if section.method == "none":
        fresh_folder(paths.out("quantize", "model"))
        write_json(paths.out("quantize", "report.json"), {"method": "none", "reason": SKIPPED})
        write_json(paths.metrics("quantize"), {"method": "none"})
        progress(1, 1, SKIPPED)
        return
    calibration = calibration_rows(section, paths)
    settings = GPTQSettings(
        bits=section.bits,
        group_size=section.group_size,
        sym=section.sym,
        desc_act=section.desc_act,
        damp_percent=section.damp_percent,
    )
    merged, quantized = paths.out("merge", "model"), paths.out("quantize", "model")
    report = quantize_gptq(merged, quantized, calibration, settings, on_progress=progress)
    write_json(paths.out("quantize", "report.json"), {"method": "gptq", **report.to_dict()})
    write_json(paths.metrics("quantize"), figures(report))
    write_json(paths.timings("quantize"), {"seconds": round(time.monotonic() - started, 1)})
    print(summary(report), flush=True)


def calibration_rows(section: QuantizeSection, paths: Paths) -> list[list[int]]:
    """The training rows that GPTQ measures activations on: what the model will see, chosen by seed."""
    train = load_from_disk(str(paths.out("pack", "train")))
    rows = train["input_ids"][:]
    chosen = select_calibration(rows, section.num_calibration_rows, section.calibration_length, section.seed)
    if len(chosen) < section.num_calibration_rows:
        print(
            f"note: {len(chosen)} calibration rows, all there are, instead of {section.num_calibration_rows}",
            flush=True,
        )
    return chosen


def figures(report: QuantizeReport) -> dict[str, float | int | str]:
    """What DVC and MLflow compare between runs."""
    return {
        "method": "gptq",
        "source_mb": report.source_bytes / 1e6,
        "quantized_mb": report.quantized_bytes / 1e6,
        "size_ratio": report.size_ratio,
        "mean_relative_error": report.mean_relative_error,
        "max_relative_error": report.worst.relative_error,
        "num_damping_retries": report.num_damping_retries,
        "loading_deviation": report.loading_deviation,
        "num_calibration_rows": report.num_rows,
        "num_calibration_tokens": report.num_tokens,
    }


def summary(report: QuantizeReport) -> str:
    """One line about the result."""
    worst = report.worst
    return (
        f"{report.source_bytes / 1e6:.0f} MB -> {report.quantized_bytes / 1e6:.0f} MB ({report.size_ratio:.1%}), "
        f"mean relative error {report.mean_relative_error:.3f}, worst {worst.relative_error:.3f} "
        f"(block {worst.layer} {worst.module})"
    )
