"""One contender of the training benchmark, in a process of its own: `python benchmarks/contenders.py NAME ...`.

Prints one line of JSON: tokens and seconds of the timed steps, losses step by step, peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
WARMUP_STEPS = 2
# Per contender: which library, and its options besides those that all share.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl, as documented": ("trl", {"per_device_train_batch_size": 8}),
    "trl, its best setting": (
        "trl",
        {"per_device_train_batch_size": 1, "packing": True, "max_length": 1400, "gradient_checkpointing": False},
    ),
    "sft, same batches": ("sft", {"per_device_train_batch_size": 8, "padding_free": True}),
    "sft, padded": ("sft", {"per_device_train_batch_size": 8}),
    "sft, packed": ("sft", {"per_device_train_batch_size": 1, "packing": True}),
    "sft, same rows packed": ("sft", {"per_device_train_batch_size": 1, "packing": True, "max_length": 1400}),
}


class Clock(TrainerCallback):
    """Times whole steps after the warm-up."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the first step that counts."""
        if state.global_step == WARMUP_STEPS:
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time up to here."""
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class CountedCollator:
    """Counts the tokens of batches that are not padding, as the wrapped collator makes them."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator, self.counts = collator, list[int]()

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.counts.append(sum(len(row["input_ids"]) for row in rows))
        return self.collator(rows)


def read_rows(path: Path) -> Dataset:
    """Rows with prompt and completion out of conversations, instruction data or pairs."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    pairs = []
    for row in rows:
        if "messages" in row:
            pairs.append({"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
        else:
            question = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
            pairs.append(
                {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": row["output"]}],
                }
            )
    return Dataset.from_list(pairs)


def run(name: str, model_dir: Path, data: Path, num_steps: int) -> dict[str, Any]:
    """Train `num_steps` timed steps behind the warm-up, and measure."""
    library, options = CONTENDERS[name]
    if library == "sft":
        sys.path.insert(0, str(ROOT))
    package = __import__(library, fromlist=["SFTTrainer", "SFTConfig"])
    torch.manual_seed(0)
    config = package.SFTConfig(
        **{
            "output_dir": "/tmp/bench",
            "max_length": 512,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_steps": WARMUP_STEPS + num_steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "seed": 0,
            **options,
        }
    )
    trainer = package.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=config,
        train_dataset=read_rows(data),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    clock, collator = Clock(), CountedCollator(trainer.data_collator)
    trainer.data_collator = collator
    trainer.add_callback(clock)
    trainer.train()
    return {
        "name": name,
        "tokens": sum(collator.counts[WARMUP_STEPS : WARMUP_STEPS + num_steps]),
        "seconds": clock.seconds,
        "losses": clock.losses,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> None:
    """Run the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    print("RESULT " + json.dumps(run(args.name, args.model, args.data, args.steps)), flush=True)


if __name__ == "__main__":
    main()
