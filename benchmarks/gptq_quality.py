"""GPTQ's options compared on the embedded model: distance of its logits from those of the float model, and perplexity.

Usage: python -m benchmarks.gptq_quality [--only NAME ...] [--out FILE]

Rows of the default data are rendered with the model's template and cut into rows of equal length. Training rows
calibrate; all variants are measured on the same held-out rows. Results are written after each variant, and variants
that FILE has are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sft.export.gptq import GPTQSettings, load_dequantized, quantize_gptq
from sft.export.proof import iterate_logits
from sft.export.quantization import select_calibration
from stages.models.base import embedded_folder

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 256
NUM_MEASURED_ROWS = 16

VARIANTS: dict[str, tuple[GPTQSettings, int]] = {
    "group 64": (GPTQSettings(), 32),
    "group 64, mse 2.4": (GPTQSettings(mse=2.4), 32),
    "group 32": (GPTQSettings(group_size=32), 32),
    "group 32, mse 2.4": (GPTQSettings(group_size=32, mse=2.4), 32),
    "group 64, 128 rows": (GPTQSettings(), 128),
    "group 64, desc_act": (GPTQSettings(desc_act=True), 32),
    "group 64, foem": (GPTQSettings(more={"foem": {"alpha": 0.0, "beta": 0.2}}), 32),
    "group 64, gptaq": (GPTQSettings(more={"gptaq": {"alpha": 0.25}}), 32),
    "group 64, damp 0.01": (GPTQSettings(damp_percent=0.01), 32),
    "group 64, asymmetric": (GPTQSettings(sym=False), 32),
    "group 64, 8 rows": (GPTQSettings(), 8),
    "group 128": (GPTQSettings(group_size=128), 32),
    "group 32, mse 2.4, 128 rows": (GPTQSettings(group_size=32, mse=2.4), 128),
}
"""Name -> settings, number of calibration rows."""


def main() -> None:
    """Compute the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("gptq_quality.json"))
    options = parser.parse_args()
    model = embedded_folder("embedded:smollm2-135m-instruct")
    train, held_out = (rows_of(ROOT / "data" / f"shop_{split}.jsonl", model) for split in ("train", "eval"))
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        if name not in found:
            settings, num_rows = VARIANTS[name]
            try:
                found[name] = measure(model, settings, select_calibration(train, num_rows, LENGTH, 0), held_out)
            except ValueError as error:
                found[name] = {"error": str(error)}
            options.out.write_text(json.dumps(found, indent=2))
        print(line(name, found[name]), flush=True)


def rows_of(file: Path, model: Path) -> list[list[int]]:
    """Return the conversations of a file as token rows of equal length."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    conversations = [json.loads(text)["messages"] for text in file.read_text(encoding="utf-8").splitlines()]
    text = "".join(tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH + 1, LENGTH)]


def measure(
    model: Path, settings: GPTQSettings, calibration: list[list[int]], held_out: list[list[int]]
) -> dict[str, Any]:
    """Quantize a model and compare it with the original on held-out rows."""
    rows = held_out[:NUM_MEASURED_ROWS]
    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        report = quantize_gptq(model, Path(work) / "quantized", calibration, settings)
        seconds = time.perf_counter() - start
        quantized = load_dequantized(Path(work) / "quantized")
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        divergence, agreement, losses = compare(reference, quantized, rows)
    return {
        "kl": divergence,
        "top_token_agreement": agreement,
        "perplexity_float": math.exp(losses[0]),
        "perplexity": math.exp(losses[1]),
        "relative_error": report.mean_relative_error,
        "mb": report.quantized_bytes / 1e6,
        "seconds": seconds,
        "num_rows": report.num_rows,
    }


def compare(
    reference: PreTrainedModel, quantized: PreTrainedModel, rows: list[list[int]]
) -> tuple[float, float, list[float]]:
    """Return mean KL divergence (nats per token), share of equal top tokens, and the two losses (nats per token)."""
    divergence, agreement, losses, num_positions = 0.0, 0, [0.0, 0.0], 0
    for row, logits in zip(rows, _pairs(reference, quantized, rows), strict=True):
        ours, theirs = (part.double().log_softmax(-1)[:-1] for part in logits)
        labels = torch.tensor(row[1:])[:, None]
        divergence += float((ours.exp() * (ours - theirs)).sum())
        agreement += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        losses = [loss - float(part.gather(1, labels).sum()) for loss, part in zip(losses, (ours, theirs), strict=True)]
        num_positions += len(row) - 1
    return divergence / num_positions, agreement / num_positions, [loss / num_positions for loss in losses]


def _pairs(
    reference: PreTrainedModel, quantized: PreTrainedModel, rows: list[list[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(iterate_logits(reference, rows), iterate_logits(quantized, rows), strict=True)


def line(name: str, figures: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    if "error" in figures:
        return f"| {name} | {figures['error']} |"
    values = (
        f"{figures['kl']:.4f}",
        f"{figures['top_token_agreement']:.1%}",
        f"{figures['perplexity']:.3f} ({figures['perplexity_float']:.3f})",
        f"{figures['relative_error']:.4f}",
        f"{figures['mb']:.0f}",
        f"{figures['seconds']:.0f}",
    )
    return f"| {name} | {' | '.join(values)} |"


if __name__ == "__main__":
    main()
