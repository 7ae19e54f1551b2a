"""Policy for updates with non-finite gradients or a spiking loss: stop, skip, or roll back.

Each update is checked after its gradients are computed and before the optimizer uses them, so that a bad batch does not
change the weights. A rollback is done as in PaLM's training (arXiv:2204.02311): weights and optimizer are restored from
the last checkpoint, and training goes on with the rows after the bad ones.
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

NUM_RECENT = 50
"""Number of good updates whose losses a new loss is compared with."""

NUM_NEEDED = 20
"""Number of good updates before a loss is called too large."""

MAX_IN_A_ROW = 10
"""Number of bad updates in a row after which training stops whatever the policy is."""

BAD_UPDATE = "bad_update"
"""Key of log entries about bad updates; its value is the problem."""


class LossWatch(TrainerCallback, ExportableState):
    """Callback that finds bad updates; as a callback, it is saved in checkpoints with the losses it has seen.

    Args:
        policy: One of `sft.options.BAD_LOSS_POLICIES`; None = check nothing.
        factor: An update is also bad if its loss is more than this many times the median of the last 50; None = only
            if its gradients are not finite.
        recent: Losses of the last good updates.
        num_in_a_row: Number of bad updates since the last good one.
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
        """Return what `transformers.Trainer` writes into a checkpoint and constructs the callback from again."""
        own = {name: getattr(self, name) for name in ("policy", "factor", "recent", "num_in_a_row")}
        return {"args": own, "attributes": {}}

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one accumulation step of this process to the loss of the update."""
        if self.factor is not None:
            self._loss = loss if self._loss is None else self._loss + loss

    def problem(self, grad_norm: Any, gather: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
        """Check the update whose gradients have been computed, and start the next one.

        Args:
            grad_norm: Norm of the gradients over all processes; None if the training engine does not report it.
            gather: Collects a tensor from all processes.

        Returns:
            What is wrong, the same on all processes; None for a good update.
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


def warn_of_bad_updates(logs: dict[str, Any], step: int) -> bool:
    """Warn if a log line has a gradient norm that is not finite and nothing is done about it; return whether it has."""
    norm = logs.get("grad_norm")
    if norm is None or math.isfinite(float(norm)):
        return False
    logger.warning(
        "step %d: the norm of the gradient is %s, and on_bad_loss=None applies every update, so that the weights are "
        "not finite any more; set on_bad_loss to stop, skip or rollback, lower learning_rate, or look at the data",
        step,
        float(norm),
    )
    return True


def act_on(trainer: Any, watch: LossWatch, problem: str) -> None:
    """Apply the policy to a bad update, and write what was done into the trainer's log history.

    Args:
        trainer: `transformers.Trainer`, after the backward pass and before the optimizer's step.
        watch: Has the policy and counts bad updates.
        problem: What is wrong, as `LossWatch.problem` returns it.

    Raises:
        ValueError: The policy is to stop or can't be applied, too many updates in a row are bad, or there is no
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
            f"step {step}: {problem}, and on_bad_loss={watch.policy} can't be applied: DeepSpeed has made the update "
            "together with its gradients; resume from the last checkpoint with a lower learning_rate"
        )
    if watch.num_in_a_row > MAX_IN_A_ROW:
        raise ValueError(
            f"step {step}: {problem}, and so it was in the {MAX_IN_A_ROW} updates before; on_bad_loss={watch.policy} "
            "does not help here: lower learning_rate, or look at the data"
        )
    for parameter in trainer.model.parameters():
        parameter.grad = None  # optimizers skip parameters without gradient
    action = "skipped" if watch.policy == "skip" else f"went back to {roll_back(trainer, step, problem)}"
    logger.warning("step %d: %s; %s", step, problem, action)
    trainer.state.log_history.append({"step": step, BAD_UPDATE: problem, "action": action})


def roll_back(trainer: Any, step: int, problem: str) -> str:
    """Restore model and optimizer from the last checkpoint; the learning rate schedule goes on from this step.

    Args:
        trainer: `transformers.Trainer`, after the backward pass and before the optimizer's step.
        step: Number of the bad update, for the message.
        problem: What is wrong, for the message.

    Returns:
        Name of the checkpoint's folder.

    Raises:
        ValueError: There is no checkpoint yet.
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
