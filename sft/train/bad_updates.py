"""What becomes of an update whose loss is no number, or far above what it was: stop, skip it, or go back.

The verdict falls when the gradients are there and before the optimizer uses them, so that a bad batch never reaches the
weights. Rolling back is done as in PaLM's training (arXiv:2204.02311): with weights and optimizer of the last
checkpoint, the training goes on behind the bad rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)

NUM_RECENT, NUM_NEEDED = 50, 20

MAX_IN_A_ROW = 10

BAD_UPDATE = "bad_update"
"""Key of the log's entries on what was found and done."""


class LossWatch(TrainerCallback, ExportableState):
    """Judges updates; a callback so that what it remembers goes into checkpoints.

    Args:
        policy: One of `sft.options.BAD_LOSS_POLICIES`; None = never look.
        factor: A loss so many times the median of the last 50 is bad too; None = only one that is no number.
        recent: Losses of the last good updates.
        num_in_a_row: Bad updates since the last good one.
    """

    def __init__(
        self,
        policy: str | None = None,
        factor: float | None = None,
        recent: list[float] | None = None,
        num_in_a_row: int = 0,
    ) -> None:
        self.policy, self.factor, self.recent, self.num_in_a_row = policy, factor, recent or [], num_in_a_row
        self._loss: torch.Tensor | None = None

    def state(self) -> dict[str, dict[str, Any]]:
        """What upstream writes, and makes a callback of again."""
        own = {name: getattr(self, name) for name in ("policy", "factor", "recent", "num_in_a_row")}
        return {"args": own, "attributes": {}}

    def add(self, loss: torch.Tensor) -> None:
        """Take in the loss of one part of an update, on this process."""
        if self.factor is not None:
            self._loss = loss if self._loss is None else self._loss + loss

    def problem(self, grad_norm: Any, gather: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
        """What is wrong with the update whose gradients are there; None for nothing. All processes say the same.

        Args:
            grad_norm: Norm of the gradients over all processes; None where an engine does not tell it.
            gather: Collects a tensor from all processes.
        """
        if self.policy is None:
            return None
        loss, self._loss = self._loss, None
        if grad_norm is not None and not math.isfinite(float(grad_norm)):
            return f"the norm of the gradient is {float(grad_norm)}"
        if self.factor is None or loss is None:
            self.num_in_a_row = 0
            return None
        value = float(gather(loss.reshape(1)).mean())
        usual = median(self.recent) if len(self.recent) >= NUM_NEEDED else math.inf
        if not value <= self.factor * usual:
            return f"the loss is {value:.4g}, more than {self.factor:g} times the median of the last {len(self.recent)}"
        self.recent = [*self.recent[1 - NUM_RECENT :], value]
        self.num_in_a_row = 0
        return None


def act_on(trainer: Any, watch: LossWatch, problem: str) -> None:
    """Follow the policy for an update that has not happened yet, and write into the trainer's log what was done.

    Args:
        trainer: `transformers.Trainer` between gradients and optimizer.
        watch: Holds the policy.
        problem: What was found.

    Raises:
        ValueError: The policy is to stop or can't be followed, updates are bad again and again, or there is no
            checkpoint to go back to.
    """
    step = trainer.state.global_step + 1
    watch.num_in_a_row += 1
    if watch.policy == "stop":
        raise ValueError(
            f"step {step}: {problem}; training stopped before this update. Lower learning_rate, look at the data, or "
            "set on_bad_loss to skip or rollback"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"step {step}: {problem}, and on_bad_loss={watch.policy} can't be followed: DeepSpeed has made the update "
            "together with its gradients; go on from the last checkpoint with a lower learning_rate"
        )
    if watch.num_in_a_row > MAX_IN_A_ROW:
        raise ValueError(
            f"step {step}: {problem}, and so it was in the {MAX_IN_A_ROW} updates before; on_bad_loss={watch.policy} "
            "does not help here: lower learning_rate, or look at the data"
        )
    for parameter in trainer.model.parameters():
        parameter.grad = None  # optimizers pass over parameters without gradient
    action = "skipped" if watch.policy == "skip" else f"went back to {roll_back(trainer, step, problem)}"
    logger.warning("step %d: %s; %s", step, problem, action)
    trainer.state.log_history.append({"step": step, BAD_UPDATE: problem, "action": action})


def roll_back(trainer: Any, step: int, problem: str) -> str:
    """Give model and optimizer what they were at the last checkpoint; the learning rate follows the steps on.

    Returns:
        The checkpoint's name.
    """
    checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint is None:
        raise ValueError(
            f"step {step}: {problem}, and there is no checkpoint yet to go back to; lower save_steps or learning_rate, "
            "or set on_bad_loss to skip"
        )
    schedule = trainer.lr_scheduler.state_dict()
    trainer._load_from_checkpoint(checkpoint, trainer.model_wrapped if trainer.is_fsdp_enabled else None)
    trainer._load_optimizer_and_scheduler(checkpoint)
    trainer.lr_scheduler.load_state_dict(schedule)
    return Path(checkpoint).name
