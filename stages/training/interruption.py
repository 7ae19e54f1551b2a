"""Stop a training after an optimizer step with a checkpoint, so that it can be resumed from exactly there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback


class SaveAndStop(TrainerCallback):
    """Callback that saves a checkpoint and stops the training after the step in which it was asked to.

    All processes of a training stop after the same step, whichever of them was asked. A training that was asked in its
    last step ends as if it had not been asked.

    Args:
        is_asked: Returns whether this process was asked.

    Attributes:
        stopped: Whether the training was stopped before its last step.
    """

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked, self.stopped = is_asked, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and for the end of the training."""
        asked = self._is_asked()
        if args.world_size > 1:
            asked = bool(gather(torch.tensor([int(asked)], device=args.device)).any())
        if asked and not control.should_training_stop:
            control.should_save = control.should_training_stop = self.stopped = True
