"""One contender of the preparation benchmark, run as a separate process: `prepare_contenders.py LIBRARY ...`.

It turns a JSONL file into packed rows with labels, as the library's trainer does before it trains. It prints one line,
`RESULT` and JSON: tokens, seconds, packed rows, fill, peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def preparer(library: str, rows: Dataset, tokenizer: Any, max_length: int, num_proc: int) -> Callable[[Dataset], Any]:
    """Return the function by which a library's trainer prepares a training set; imports are not timed."""
    if library == "sft":
        sys.path.insert(0, str(ROOT))
    package = __import__(library, fromlist=["SFTTrainer", "SFTConfig"])
    config = package.SFTConfig(
        output_dir="/tmp/bench",
        max_length=max_length,
        packing=True,
        dataset_num_proc=num_proc if num_proc > 1 else None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    if library == "sft":
        prepare_dataset = __import__("sft.train.datasets", fromlist=["prepare_dataset"]).prepare_dataset
        return lambda dataset: prepare_dataset(dataset, tokenizer, config, packing=True)
    # trl prepares in a method of its trainer, which needs a model: use a tiny one
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    trainer = package.SFTTrainer(model, args=config, train_dataset=rows.select(range(8)), processing_class=tokenizer)
    return lambda dataset: trainer._prepare_dataset(dataset, tokenizer, config, True, None, "train")


def run(library: str, model_dir: Path, data: Path, max_length: int, num_proc: int) -> dict[str, Any]:
    """Prepare a file once and return the measurements."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with tempfile.TemporaryDirectory() as cache:
        few = load_dataset("json", data_files=str(data), split="train[:16]", cache_dir=f"{cache}/few")
        prepare = preparer(library, few, tokenizer, max_length, num_proc)
        started = time.perf_counter()
        packed = prepare(load_dataset("json", data_files=str(data), split="train", cache_dir=f"{cache}/all"))
        seconds = time.perf_counter() - started
        num_tokens = sum(len(chunk.flatten()) for chunk in packed.data.column("input_ids").chunks)
        return {
            "library": library,
            "tokens": num_tokens,
            "seconds": seconds,
            "rows": len(packed),
            "fill": num_tokens / (len(packed) * max_length),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }


def main() -> None:
    """Run the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=("sft", "trl"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--num-proc", type=int, default=1)
    args = parser.parse_args()
    result = run(args.library, args.model, args.data, args.max_length, args.num_proc)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
