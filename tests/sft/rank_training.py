"""`python -m tests.sft.rank_training FILE ...`: the named tiny trainings, in as many processes as a launcher starts."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import EvalPrediction
from transformers.trainer_utils import get_last_checkpoint

from sft.config import SFTConfig
from sft.labels import IGNORE_INDEX
from sft.train.trainer import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer

NUM_STEPS = 20
CHECKPOINTS = "RANK_TRAINING_CHECKPOINTS"
"""Environment variable with a folder where checkpoints are kept; training is resumed from the last one in it."""

FIGURES = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "eval_loss", "eval_targets", "eval_hits")
# 21 rows are two batches of 8 and one of 5, and packed ones leave a process without any row in the last batch
ROWS = [
    {"prompt": f"What is {number} and {number}?", "completion": f" It is {2 * number}." * (1 + number % 3)}
    for number in range(21)
]
EVAL_ROWS = ROWS[:5]
ROUTES: dict[str, dict[str, Any]] = {
    "padded": {},
    "measured": {},  # padded, and a metric sees the logits
    "padding-free": {"padding_free": True},
    "packed": {"packing": True},
}
METHODS = ("full", "lora")
NAMES = [f"{method} {route}" for method in METHODS for route in ROUTES if (method, route) != ("lora", "measured")]


def count_hits(prediction: EvalPrediction) -> dict[str, float]:
    """Targets that the metric is shown, and how many of them have the largest logit."""
    targets, guesses = prediction.label_ids[:, 1:], prediction.predictions[:, :-1].argmax(-1)
    kept = targets != IGNORE_INDEX
    return {"targets": int(kept.sum()), "hits": int((guesses == targets)[kept].sum())}


def train(name: str, per_device: int, accumulation: int, **options: Any) -> dict[str, Any]:
    """Train 20 steps, or those after a checkpoint; return what all steps logged, and all weights.

    Args:
        name: Method and route.
        per_device: Rows per forward pass and process.
        accumulation: Forward passes per update.
        options: Other options of the training.
    """
    method, route = name.split(" ")
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(os.environ[CHECKPOINTS], name) if CHECKPOINTS in os.environ else Path(nowhere)
        last = get_last_checkpoint(str(folder)) if folder.exists() else None
        config = SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=per_device,
            per_device_eval_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            **{
                "max_steps": NUM_STEPS,
                "max_length": 48,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "steps" if CHECKPOINTS in os.environ else "no",
                "save_steps": NUM_STEPS // 2,
                "eval_strategy": "steps",
                "eval_steps": 10,
                "max_grad_norm": 0.15,
                "on_untrained": "fail",
                "report_to": [],
                "disable_tqdm": True,
                **ROUTES[route],
                **options,
            },
        )
        trainer = SFTTrainer(
            tiny_model(),
            args=config,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(EVAL_ROWS),
            processing_class=tiny_tokenizer(),
            compute_metrics=count_hits if route == "measured" else None,
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if method == "lora" else None,
        )
        trainer.train(resume_from_checkpoint=last)
    history = trainer.state.log_history
    weights = {name: whole(value).detach().clone() for name, value in trainer.model.named_parameters()}
    return {**{name: [entry[name] for entry in history if name in entry] for name in FIGURES}, "weights": weights}


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight of which each process may have a part."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def main(file: str, per_device: str, accumulation: str, *names: str) -> None:
    """Train, and have the first process write the results."""
    results = {name: train(name, int(per_device), int(accumulation)) for name in names}
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
        if rank != 0:
            return
    torch.save(results, Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
