"""Training speed and memory at the shapes of real models: `python -m benchmarks.gpu speed`.

Each contender runs in a process of its own, on the same rows of random tokens, one after the other on the same card.
It prints tokens per second (median over the timed steps), TFLOP/s by the count of `roofline.py` (without
recomputation, as MFU is defined), the share of the card's dense bf16 peak, peak memory and the first and last loss.
Losses of the same rows in the same batches are equal up to rounding; where they are not, the table shows it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from benchmarks.contenders import WARMUP_STEPS, CountedCollator, now, peak_bytes
from benchmarks.gpu.roofline import CARDS, Card, model_flop
from benchmarks.gpu.shapes import SHAPES, Shape, in_four_bits, random_model, word_tokenizer

TINY_LENGTH = 256


@dataclass(frozen=True)
class Job:
    """A row of the table before it is measured.

    Attributes:
        shape: Of `SHAPES`.
        method: lora, qlora or full.
        rows: `long` (one document per row) or `chats` (packed documents of some 300 tokens).
        length: Tokens per row.
        checkpointing: Whether activations are computed twice.
    """

    shape: str
    method: str = "lora"
    rows: str = "long"
    length: int = 4096
    checkpointing: bool = False


JOBS = [
    Job("llama-3-8b"),
    Job("llama-3-8b", rows="chats"),
    Job("llama-3-8b", "qlora"),
    Job("qwen2.5-7b"),
    Job("qwen3-8b"),
    Job("qwen3.5-9b"),
    Job("smollm2-1.7b"),
    Job("smollm2-1.7b", "full"),
    Job("llama-3-8b", "full", checkpointing=True),
]
CONTENDERS = {
    "sft": {},
    "sft, Liger": {"use_liger_kernel": True},
    "sft, compiled": {"torch_compile": True},
    "trl + Liger": {"use_liger_kernel": True},
    "unsloth": {},
}
"""Name of a contender -> options of its `SFTConfig` in addition to those that all share."""


def documents(job: Job, shape: Shape, steps: int) -> list[list[int]]:
    """Return the token ids of the rows' documents, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    needed = job.length * (steps + WARMUP_STEPS)
    if job.rows == "long":
        lengths = [job.length] * (steps + WARMUP_STEPS)
    else:
        low, high = max(4, job.length // 40), max(8, job.length // 8)
        lengths = []
        while sum(lengths) < needed * 1.3:
            lengths.append(int(torch.randint(low, high, (1,), generator=generator)))
    return [torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist() for length in lengths]


def contend(name: str, job: Job, tiny: bool, steps: int, device: str) -> dict[str, Any]:
    """Train as one contender in this process, and return what it measured."""
    library = name.split()[0].rstrip(",")
    shape = SHAPES[job.shape].tiny() if tiny else SHAPES[job.shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(dir=os.environ.get("SFT_BENCH_DIR")) as folder:
        if library == "unsloth":
            import unsloth  # noqa: F401  (before transformers' trainer is used)
        package = __import__("trl" if library == "unsloth" else library, fromlist=["SFTTrainer", "SFTConfig"])
        started = time.monotonic()
        tokenizer = word_tokenizer(shape.vocabulary)
        lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
        if library == "unsloth":
            model, adapter = _unsloth_model(shape, job, dtype, device, folder, tokenizer, lora)
        else:
            model = random_model(shape, device, dtype)
            if job.method == "qlora":
                model = in_four_bits(model, folder, device)
            adapter = (
                None if job.method == "full" else LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **lora)
            )
        options: dict[str, Any] = {
            "output_dir": folder,
            "max_length": job.length,
            "packing": job.rows == "chats",
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "max_steps": WARMUP_STEPS + steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "gradient_checkpointing": job.checkpointing,
            "use_cpu": device == "cpu",
            "bf16": device == "cuda",
            "seed": 0,
            **CONTENDERS[name],
        }
        if library == "sft":
            options["shuffle_dataset"] = False
        rows = Dataset.from_dict({"input_ids": documents(job, shape, steps)})
        trainer = package.SFTTrainer(
            model,
            args=package.SFTConfig(**options),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=adapter,
        )
        clock, collator = StepClock(), CountedCollator(trainer.data_collator)
        trainer.data_collator = collator
        trainer.add_callback(clock)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "tokens": collator.counts[WARMUP_STEPS : WARMUP_STEPS + steps],
        "seconds": clock.seconds[WARMUP_STEPS:],
        "losses": losses,
        "peak_gb": peak_bytes() / 1e9,
        "set_up": time.monotonic() - started - sum(clock.seconds),
    }


def _unsloth_model(
    shape: Shape, job: Job, dtype: torch.dtype, device: str, folder: str, tokenizer: Any, lora: dict[str, Any]
) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    random_model(shape, device, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    bits, full = job.method == "qlora", job.method == "full"
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=job.length, dtype=dtype, load_in_4bit=bits, full_finetuning=full
    )
    if not full:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        checkpointing = "unsloth" if job.checkpointing else False
        model = FastLanguageModel.get_peft_model(
            model, target_modules=names, use_gradient_checkpointing=checkpointing, **lora
        )
    return model, None


class StepClock(TrainerCallback):
    """Callback that times every step, from its first forward pass to the end of the optimizer's work."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Store the time of the step."""
        self.seconds.append(now() - self.started)


def find_card(device: str) -> tuple[str, Card | None]:
    """Return the name of the device, and its peak rates where `CARDS` knows them."""
    if device == "cpu":
        return "CPU", None
    name = torch.cuda.get_device_name()
    known = next((card for key, card in CARDS.items() if key in name.lower().replace(" ", "")), None)
    return name, known


def measure(name: str, job: Job, args: Any, python: str) -> dict[str, Any]:
    """Run one contender in a process of its own, and return its row; what fails is a row with the reason."""
    command = [python, "-m", "benchmarks.gpu", "contend", "--name", name, "--job", json.dumps(asdict(job))]
    command += ["--steps", str(args.steps), "--device", args.device] + ["--tiny"] * args.tiny
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    row: dict[str, Any] = {"contender": name, **asdict(job)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {**row, "reason": f"took longer than {args.limit} s"}
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return {**row, "reason": (last[0] if last else f"ended with {done.returncode}")[:200]}
    return {**row, **json.loads(results[-1])}


def add_rates(row: dict[str, Any], card: Card | None, tiny: bool) -> dict[str, Any]:
    """Add tokens/s, TFLOP/s and the share of the peak to a measured row."""
    if "seconds" not in row:
        return row
    shape = SHAPES[row["shape"]].tiny() if tiny else SHAPES[row["shape"]]
    speeds = [tokens / seconds for tokens, seconds in zip(row["tokens"], row["seconds"], strict=False)]
    speed = statistics.median(speeds)
    document = row["length"] if row["rows"] == "long" else row["length"] // 13
    per_token = model_flop(shape, row["length"], document, row["method"]) / row["length"]
    rates = {"tokens_per_second": speed, "tflops": speed * per_token / 1e12}
    return {**row, **rates, "peak_share": rates["tflops"] * 1e12 / card.flops if card else None}


def run(args: Any, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """Measure all jobs of all contenders, and return the rows.

    Args:
        args: `only` (parts of names of shapes and contenders), `steps`, `tiny`, `device`, `limit` (seconds per
            contender), `budget` (seconds for all: what does not fit any more is a row with this reason).
        pythons: Interpreter of each library; one that is missing is a row with the reason.
    """
    _, card = find_card(args.device)
    ends, rows = time.monotonic() + args.budget, []
    print(HEADER, flush=True)
    for job in [replace(job, length=TINY_LENGTH) for job in JOBS] if args.tiny else JOBS:
        for name in CONTENDERS:
            library = name.split()[0].rstrip(",")
            if args.only and not any(part in f"{job.shape} {job.method} {job.rows} {name}" for part in args.only):
                continue
            if time.monotonic() > ends:
                rows.append({"contender": name, **asdict(job), "reason": "no time was left"})
            elif library not in pythons:
                rows.append({"contender": name, **asdict(job), "reason": f"{library} is not installed"})
            else:
                rows.append(add_rates(measure(name, job, args, pythons[library]), card, args.tiny))
            print(line_of(rows[-1]), flush=True)
    return rows


HEADER = (
    "| shape | method | rows | contender | tokens/s | TFLOP/s | of the peak | peak GB | first and last loss |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line_of(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    method = row["method"] + (", checkpointing" if row["checkpointing"] else "")
    start = f"| {row['shape']} | {method} | {row['rows']}, {row['length']} | {row['contender']} |"
    if "tokens_per_second" not in row:
        return f"{start} {row['reason']} | | | | |".replace("\n", " ")
    share = f"{row['peak_share']:.0%}" if row["peak_share"] is not None else ""
    losses = f"{row['losses'][0]:.4f}, {row['losses'][-1]:.4f}" if row["losses"] else ""
    return (
        f"{start} {row['tokens_per_second']:,.0f} | {row['tflops']:.3g} | {share} | {row['peak_gb']:.1f} | {losses} |"
    )
