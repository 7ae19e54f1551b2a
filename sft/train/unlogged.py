"""What a training has summed up since its last log line, so that a resumed one logs what an uninterrupted one would."""

from __future__ import annotations

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class UnloggedFigures(TrainerCallback, ExportableState):
    """Goes into checkpoints with the trainer's state.

    Args:
        sums: Name of a figure -> its sum over all processes since the last log line.
    """

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self.sums = sums or {}

    def state(self) -> dict[str, dict[str, dict[str, float]]]:
        """What upstream writes, and makes a callback of again."""
        return {"args": {"sums": self.sums}, "attributes": {}}
