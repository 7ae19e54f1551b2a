"""One contender of the training benchmark, run as a separate process: `python benchmarks/contenders.py NAME ...`.

It prints one line, `RESULT` and JSON: tokens and seconds of the timed steps, loss of each step, peak memory.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
WARMUP_STEPS = 2
METHODS = ("lora", "full", "qlora")
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TRL_BEST = {"per_device_train_batch_size": 1, "packing": True, "max_length": 1400, "gradient_checkpointing": False}
PACKED = {"per_device_train_batch_size": 1, "packing": True, "max_length": 1400}
# Contender -> its library, and its options in addition to the common ones.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl, as documented": ("trl", {"per_device_train_batch_size": 8}),
    "trl, its best setting": ("trl", TRL_BEST),
    "sft, same batches": ("sft", {"per_device_train_batch_size": 8}),
    "sft, padded": ("sft", {"per_device_train_batch_size": 8, "padding_free": False}),
    "sft, packed": ("sft", {"per_device_train_batch_size": 1, "packing": True}),
    "sft, same rows packed": ("sft", PACKED),
}
# Ablations: one speed-up switched off at a time, on the same packed rows.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "without shared tokens": ("sft", {**PACKED, "share_tokens": False}),
    "without fused LoRA": ("sft", {**PACKED, "fused_lora": False}),
    "without fused norms and SwiGLU": ("sft", {**PACKED, "fused_layers": False}),
    "without oneDNN's products": ("sft", {**PACKED, "without": "onednn"}),
    "without the head on targets alone": ("sft", {**PACKED, "without": "head on targets"}),
    "without attention by document": ("sft", {**PACKED, "without": "attention by document"}),
}


def now() -> float:
    """Return the time in seconds after the GPU has finished its queued work."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Callback that times the steps after the warm-up."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock at the first timed step."""
        if state.global_step == WARMUP_STEPS:
            self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the time since the start."""
        self.seconds = now() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Store the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class Profile(TrainerCallback):
    """Callback that profiles the last step and prints the time of each operation to stderr."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the profiler at the last step."""
        if state.global_step == state.max_steps - 1:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the profiler after the last step and print its table."""
        if state.global_step == state.max_steps:
            self.profiler.stop()
            averages = self.profiler.key_averages()
            column = "self_cuda_time_total" if ON_GPU else "self_cpu_time_total"
            print(averages.table(sort_by=column, row_limit=25, max_name_column_width=40), file=sys.stderr)


class CountedCollator:
    """Wrapper of a collator that counts the tokens of its batches, without padding."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator, self.counts, self.num_supervised = collator, list[int](), 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.counts.append(sum(len(row["input_ids"]) for row in rows))
        batch = self.collator(rows)
        self.num_supervised += int((batch["labels"] >= 0).sum())
        return batch


def read_rows(path: Path) -> Dataset:
    """Read conversations or instruction data as rows with prompt and completion."""
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


def full_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Compute the loss in the usual way: logits of all tokens, then cross entropy."""
    logits = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    return loss / num_items_in_batch


def switch_off(trick: str | None) -> dict[str, Any]:
    """Switch off a speed-up for which the trainer has no option; return further arguments of the trainer."""
    if trick == "onednn":
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    if trick == "head on targets":
        return {"compute_loss_func": full_loss}
    if trick == "attention by document":
        from sft.attention.choice import AttentionChoice
        from sft.train import batches

        batches.choose_packed_attention = lambda *_: AttentionChoice("sdpa", "for comparison")
    return {}


def load_model(model_dir: Path, method: str) -> Any:
    """Load the base model, in 4 bits for QLoRA."""
    options = {}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE
        )
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPE, **options)


def peak_bytes() -> int:
    """Return the peak memory in bytes: of the GPU, or of the process (which Linux reports in KiB)."""
    return torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train for the warm-up and `steps` timed steps, and return the measurements."""
    library, options = {**CONTENDERS, **ABLATIONS}[args.name]
    options = {"max_length": args.max_length, **options}
    if library == "sft":
        sys.path.insert(0, str(ROOT))
    package = __import__(library, fromlist=["SFTTrainer", "SFTConfig"])
    torch.manual_seed(0)
    further = switch_off(options.pop("without", None))
    config = package.SFTConfig(
        **{
            "output_dir": "/tmp/bench",
            "learning_rate": 1e-4 if args.method != "full" else 1e-5,
            "lr_scheduler_type": "constant",
            "max_steps": WARMUP_STEPS + args.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": not ON_GPU,
            "bf16": ON_GPU,
            "seed": 0,
            **options,
        }
    )
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = package.SFTTrainer(
        load_model(args.model, args.method),
        args=config,
        train_dataset=read_rows(args.data),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=None if args.method == "full" else lora,
        **further,
    )
    clock, collator = Clock(), CountedCollator(trainer.data_collator)
    trainer.data_collator = collator
    trainer.add_callback(clock)
    if args.profile:
        trainer.add_callback(Profile())
    trainer.train()
    return {
        "name": args.name,
        "tokens": sum(collator.counts[WARMUP_STEPS : WARMUP_STEPS + args.steps]),
        "supervised": collator.num_supervised / sum(collator.counts),
        "seconds": clock.seconds,
        "losses": clock.losses,
        "peak_gb": peak_bytes() / 1e9,
    }


def main() -> None:
    """Run the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices={**CONTENDERS, **ABLATIONS})
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="print where the last step's time goes")
    print("RESULT " + json.dumps(run(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
