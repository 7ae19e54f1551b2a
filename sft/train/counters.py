"""How many tokens a training has read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class TokensSeen:
    """Counts the tokens of batches; nothing is read from the device before `take`."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, inputs: Mapping[str, Any], *, padding: bool = False) -> None:
        """Take one batch in, with its padding or without; a flat one has none, and no attention mask.

        A batch that only fills the step of a process up, as `sft.train.processes` makes it, is none of the training's.
        """
        if "filler" in inputs:
            return
        mask, input_ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is not None and mask.dim() == 2 and not padding:
            self._count += mask.sum()
        elif input_ids is not None:
            self._count += input_ids.numel()

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> int:
        """Tokens since the last `take`, over all processes.

        Args:
            gather: collects a tensor from all processes.
        """
        total = int(gather(self._count).sum())
        self._count.zero_()
        return total
