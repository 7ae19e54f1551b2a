"""One training step of a trainer, timed, for benchmarks in which two ways take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sft.train.trainer import SFTTrainer


def timed_step(trainer: SFTTrainer) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a function that runs one training step on the trainer's first batch, and this batch.

    The function returns the seconds that the step took. No weight changes: the gradients are cleared after each step.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.model.train()

    def step() -> float:
        started = time.perf_counter()
        trainer.training_step(trainer.model, dict(batch), count)
        trainer.model.zero_grad()
        return time.perf_counter() - started

    return step, batch
