"""Rows streamed into a training beside rows on the disk: `python benchmarks/streaming.py --rows N --steps STEPS`.

The same conversations (those of `prepare_scale.py`) are trained by the stages of the pipeline twice: with
`load.streaming: false`, and `true`. The model has random weights and two layers of width 16, so that a training takes
little more than its rows. The table has CPU seconds and the peak memory of each stage, the size of `outs/` without the
model, and the tokens per second of `train`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.prepare_scale import conversations, measure  # noqa: E402
from stages.params.schema import load_params  # noqa: E402
from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

STAGES = ("load", "format", "pack", "train")
OF_ALL_ROWS = ("near_duplicate", "near_eval", "length_outlier", "rare_language")


def write_root(root: Path, args: argparse.Namespace, *, streaming: bool) -> None:
    """Make a checkout that contains the data, a tiny model and parameters."""
    (root / "data").mkdir(parents=True)
    with (root / "data" / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(args.rows, seed=0))
    with (root / "data" / "eval.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(100, seed=1))
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    values: dict[str, Any] = load_params(ROOT / "params.yaml").model_dump()
    values["model"]["name_or_path"] = str(root / "model")
    values["load"] |= {"sources": [{"path": "data/rows.jsonl"}], "streaming": streaming, "rehearsal": None}
    values["load"]["eval"] |= {"path": "data/eval.jsonl", "fraction": None}
    values["load"]["checks"] |= dict.fromkeys(OF_ALL_ROWS, "off")
    values["pack"] |= {"max_length": 1024, "num_proc": 1, "overflow": "split_with_prompt"}
    values["format"]["num_proc"] = 1
    values["train"] |= {"max_steps": args.steps, "per_device_train_batch_size": 8, "lora_r": 4}
    values["train"] |= {"eval_steps": args.steps, "save_steps": args.steps, "logging_steps": 50}
    values["train"]["samples"]["count"] = 0
    values["quantize"]["method"] = "none"
    values["evaluate"]["gate"] = ["tuned.loss <= base.loss"]
    values["evaluate"]["regression"]["path"] = None
    # JSON is YAML
    (root / "params.yaml").write_text(json.dumps(values), encoding="utf-8")


def size_mb(folder: Path) -> float:
    """Return the size of the files in a folder in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    os.environ["SFT_LIVE_RUN"] = "off"
    print("| rows | stage | CPU s | peak MB | outs MB | tokens/s |", "|---|---|---|---|---|---|", sep="\n", flush=True)
    for name, streaming in (("on the disk", False), ("streamed", True)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "root"
            write_root(root, args, streaming=streaming)
            for stage in STAGES:
                usage = measure(stage, root, threads=False)
                speed = ""
                if stage == "train":
                    timings = json.loads((root / "reports" / "timings" / "train.json").read_text(encoding="utf-8"))
                    speed = f"{timings['tokens_per_second']:,.0f}"
                size = size_mb(root / "outs" / stage)
                print(
                    f"| {name} | {stage} | {usage.cpu_seconds:.0f} | {usage.resident_mb:.0f} | {size:.1f} | {speed} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
