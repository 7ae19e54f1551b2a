"""`sft estimate`: estimate steps, memory and time of the training from a few of its steps."""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from sft.models.adapters import ParameterCount, count_parameters
from sft.train.trainer import SFTTrainer
from stages.checkout.paths import Paths
from stages.models.base import read_base_model
from stages.params.schema import Params, TrainSection
from stages.preflight.recipe import check_recipe
from stages.recipes.offline import GPUS, estimate, gpu_of, shape_of
from stages.recipes.offline import report as offline_report
from stages.tools.freshness import warn_if_stale
from stages.training.adapter import make_peft_config
from stages.training.setup import load_base, make_sft_config

NUM_STEPS = 10
NUM_WARMUP_STEPS = 2
NUM_EVAL_ROWS = 4
GB = 1e9


@dataclass(frozen=True)
class Work:
    """The amount of work of a training.

    Args:
        num_rows: Packed rows per epoch.
        num_tokens: Tokens per epoch.
        num_trained: Tokens per epoch that have a label.
        num_eval_tokens: Tokens of the held-out rows.
        num_steps: Optimizer updates of the training.
        num_epochs: Passes over the rows.
    """

    num_rows: int
    num_tokens: int
    num_trained: int
    num_eval_tokens: int
    num_steps: int
    num_epochs: float


@dataclass(frozen=True)
class Probe:
    """Measurements of a few training steps and one evaluation.

    Args:
        tokens_per_second: Speed of training.
        eval_tokens_per_second: Speed of evaluation.
        parameters: Parameter counts.
        weights: Bytes of the weights of base model and adapter.
        before: Bytes that the process used before it loaded the model; 0 on a GPU.
        peak: Largest number of bytes in use.
    """

    tokens_per_second: float
    eval_tokens_per_second: float
    parameters: ParameterCount
    weights: int
    before: int
    peak: int


def run(params: Params, paths: Paths, *, as_json: bool = False, offline: bool = False, gpu: str | None = None) -> None:
    """Print the estimate, from the outs of `load`, `format` and `pack`; nothing is written.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        as_json: Whether to print JSON.
        offline: Whether to compute it from the shape of the base model alone.
        gpu: Name of the GPU for that.

    Raises:
        ValueError: `pack` has not run here yet; or offline, the base model's shape or the GPU is not known.
    """
    if offline:
        print_offline(params, paths, gpu_of(gpu or "h100"), as_json=as_json)
        return
    if gpu is not None:
        raise ValueError("--gpu is for --offline; otherwise steps are measured on this machine")
    if not paths.out("pack", "train").exists():
        raise ValueError(f"{paths.out('pack', 'train')} is missing: type `sft pack` first")
    train, held_out = (load_from_disk(str(paths.out("pack", split))) for split in ("train", "eval"))
    work = count_work(train, held_out, params.train)
    warn_if_stale(params, paths, "pack")
    print(f"training {NUM_STEPS} steps to measure them ...", file=sys.stderr if as_json else sys.stdout, flush=True)
    # the trainer prints to standard output, too
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        found = measure(params, paths, train, held_out)
    folder = Path(read_base_model(paths.out("load", "base_model.json")).path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    advice = [f"{one.key}: {one.text}" for one in check_recipe(params.train, config)]
    if as_json:
        print(json.dumps({**as_values(work, found, params.train), "advice": advice}, indent=2))
    else:
        print("\n".join([*report(work, found, params.train), *(f"advice: {text}" for text in advice)]))


def print_offline(params: Params, paths: Paths, gpu: str, *, as_json: bool) -> None:
    """Print the estimate by the shape of the base model."""
    found = estimate(params.model_dump(), shape_of(params.model.name_or_path, paths.root))
    if as_json:
        values = {
            "memory_gb": {"peak": found.peak, **found.memory},
            "trained_parameters": found.trained,
            "tokens_per_step": found.tokens_per_step,
            "seconds_per_million_tokens": {name: found.seconds(1e6, name) for name in GPUS},
        }
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(offline_report(params.model.name_or_path, found, gpu)))


def count_work(train: Dataset, held_out: Dataset, section: TrainSection) -> Work:
    """Count the tokens and updates of the training, as `transformers.Trainer` does."""
    batches = math.ceil(len(train) / (section.per_device_train_batch_size * section.launch.processes))
    updates = math.ceil(batches / section.gradient_accumulation_steps)
    num_steps = section.max_steps if section.max_steps > 0 else math.ceil(updates * section.num_train_epochs)
    return Work(
        num_rows=len(train),
        num_tokens=sum(row_lengths(train)),
        num_trained=pc.sum(pc.greater_equal(pc.list_flatten(arrow_column(train, "labels")), 0)).as_py(),
        num_eval_tokens=sum(row_lengths(held_out)),
        num_steps=num_steps,
        num_epochs=num_steps / updates,
    )


def arrow_column(rows: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column as an Arrow array, without conversion."""
    return rows.with_format("arrow")[:][name]


def row_lengths(rows: Dataset) -> list[int]:
    """Return the number of tokens of each row."""
    lengths: list[int] = pc.list_value_length(arrow_column(rows, "input_ids")).to_pylist()
    return lengths


def measure(params: Params, paths: Paths, train: Dataset, held_out: Dataset) -> Probe:
    """Train a few steps as `train` would, first on the longest rows and then on a random sample, and measure them."""
    before = psutil.Process().memory_info().rss
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    clock = Clock()
    model = load_base(params, tokenizer, paths)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=probe_config(params.train, Path(folder)),
            train_dataset=train.select(probe_rows(train, params.train)),
            eval_dataset=held_out.select(range(min(NUM_EVAL_ROWS, len(held_out)))),
            processing_class=tokenizer,
            peft_config=make_peft_config(params, model),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        started = time.perf_counter()
        trainer.evaluate()
        eval_seconds = time.perf_counter() - started
    on_gpu = trainer.args.device.type == "cuda"
    return Probe(
        tokens_per_second=clock.tokens_per_second(),
        eval_tokens_per_second=sum(row_lengths(trainer.eval_dataset)) / eval_seconds,
        parameters=count_parameters(trainer.model),
        weights=sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        before=0 if on_gpu else before,
        peak=torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
    )


def peak_resident_bytes() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def probe_config(section: TrainSection, folder: Path) -> Any:
    """Return the options of the training, limited to a few steps without evaluation or checkpoints."""
    config = make_sft_config(section.model_copy(update={"max_steps": NUM_STEPS, "logging_steps": 1}), folder)
    config.set_save(strategy="no")
    config.set_evaluate(strategy="no")
    config.train_sampling_strategy = "sequential"
    return config


def probe_rows(train: Dataset, section: TrainSection) -> list[int]:
    """Choose the rows to train on: a batch of the longest to measure memory, then a seeded sample to measure time."""
    lengths = row_lengths(train)
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    longest = longest[: section.per_device_train_batch_size]
    wanted = NUM_STEPS * section.per_device_train_batch_size * section.gradient_accumulation_steps - len(longest)
    return longest + random.Random(section.seed).choices(range(len(lengths)), k=max(0, wanted))


class Clock(TrainerCallback):
    """Callback that times the steps after the first `NUM_WARMUP_STEPS`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time before the first step."""
        if not self.times:
            self.times.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record time and token count after each step."""
        if logs and "loss" in logs:
            self.times.append(time.perf_counter())
            self.tokens.append(logs["num_tokens"])

    def tokens_per_second(self) -> float:
        """Return the speed of the steps after the warm-up."""
        tokens = self.tokens[-1] - self.tokens[NUM_WARMUP_STEPS - 1]
        return tokens / (self.times[-1] - self.times[NUM_WARMUP_STEPS])


@dataclass(frozen=True)
class Times:
    """Predicted times of the training.

    Args:
        evaluations: Number of evaluations on the held-out rows.
        training: Seconds of training.
        evaluation: Seconds of evaluation.
    """

    evaluations: int
    training: float
    evaluation: float


def predict_times(work: Work, found: Probe, section: TrainSection) -> Times:
    """Return the times that the whole work takes at the measured speeds."""
    between = section.eval_steps if section.eval_steps >= 1 else math.ceil(work.num_steps * section.eval_steps)
    evaluations = math.ceil(work.num_steps / between)
    processes = section.launch.processes
    return Times(
        evaluations,
        training=work.num_tokens * work.num_epochs / found.tokens_per_second / processes,
        evaluation=evaluations * work.num_eval_tokens / found.eval_tokens_per_second / processes,
    )


def memory_parts(found: Probe) -> dict[str, float]:
    """Return the bytes in use at the peak, by what they are for."""
    # float32 gradients; Adam's two moments are twice that
    trained = 4 * found.parameters.num_trainable
    return {
        "weights": found.weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations and logits": found.peak - found.before - found.weights - 3 * trained,
        "Python and its libraries": found.before,
    }


def as_values(work: Work, found: Probe, section: TrainSection) -> dict[str, Any]:
    """Return the estimate for JSON: bytes, seconds and counts."""
    parts = {name.replace(" ", "_").lower(): size for name, size in memory_parts(found).items()}
    times = predict_times(work, found, section)
    return {
        "work": asdict(work),
        "parameters": {"trained": found.parameters.num_trainable, "total": found.parameters.num_total},
        "memory_bytes": {"peak": found.peak, **parts},
        "tokens_per_second": {"training": found.tokens_per_second, "evaluation": found.eval_tokens_per_second},
        "seconds": {"training": times.training, "evaluation": times.evaluation},
        "evaluations": times.evaluations,
        "processes": section.launch.processes,
    }


def report(work: Work, found: Probe, section: TrainSection) -> list[str]:
    """Return the estimate as lines of text."""
    times, processes = predict_times(work, found, section), section.launch.processes
    evaluations = f"{times.evaluations} evaluation{'s' * (times.evaluations != 1)}"
    shared = f" if {processes} processes share it evenly; memory is for one process, unsharded" * (processes > 1)
    return [
        f"rows        {work.num_rows:,} packed rows, {work.num_tokens:,} tokens, {work.num_trained:,} of them trained",
        f"steps       {work.num_steps:,} updates, {work.num_epochs:.2f} epochs, "
        f"{round(work.num_tokens * work.num_epochs):,} tokens",
        f"parameters  {found.parameters.num_trainable:,} trained of {found.parameters.num_total:,}",
        f"memory      {found.peak / GB:.2f} GB at its peak: "
        + ", ".join(f"{name} {size / GB:.2f}" for name, size in memory_parts(found).items() if size > 0),
        f"time        {duration(times.training + times.evaluation)} at {found.tokens_per_second:.0f} tokens/s, "
        f"of it {duration(times.evaluation)} for {evaluations}{shared}",
    ]


def duration(seconds: float) -> str:
    """Format seconds, such as `2 h 1 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
