"""How many tokens a training has read.

What a training has summed up since its last log line, so that a resumed one logs what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sft.batches.layout import FILLER
from sft.loss.supervised import SupervisedLoss


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


class TokensSeen:
    """Counts the tokens of batches; nothing is read from the device before `take`."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, inputs: Mapping[str, Any], *, padding: bool = False) -> None:
        """Take one batch in, with its padding or without; a flat one has none, and no attention mask.

        A batch that only fills the step of a process up, as `sft.train.processes` makes it, is none of the training's.
        """
        if FILLER in inputs:
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


class TokenTotals:
    """Adds up the figures of batches, so that means are over tokens; nothing is read from the device before `means`."""

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in (sums or {}).items()}

    def add(self, result: SupervisedLoss, *, skip_broken: bool = False) -> None:
        """Take one batch in.

        Args:
            result: its loss and figures.
            skip_broken: leave it out when its loss is not finite.
        """
        figures = {
            "loss": result.loss_sum,
            "weight": result.weight,
            "hits": result.num_correct,
            "targets": result.num_targets,
            "entropy": result.entropy,
            "router": None if result.router_loss is None else result.router_loss * result.weight,
        }
        finite = torch.isfinite(result.loss_sum) if skip_broken else None
        for name, value in figures.items():
            if value is not None:
                value = value if finite is None else torch.where(finite, value, 0)
                precise = value.double() if value.device.type in ("cpu", "cuda") else value.float()
                self._sums[name] = self._sums[name].to(precise) + precise if name in self._sums else precise

    def copy(self) -> TokenTotals:
        """The same sums, to go back to."""
        other = TokenTotals()
        other._sums = dict(self._sums)  # sums are replaced, never changed in place
        return other

    def sums(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """What was added up so far, over all processes; `gather` as for `means`."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        if gather is not None:
            sums = gather(sums).reshape(-1, len(self._sums)).sum(0)
        return dict(zip(self._sums, sums.tolist(), strict=True))

    def means(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """`loss`, `mean_token_accuracy` and, where they were summed, `entropy` and `aux_loss`; empty without targets.

        Args:
            gather: collects a tensor `(figures,)` from all processes into `(processes * figures,)`.
        """
        total = self.sums(gather)
        if not total or not total["targets"]:
            return {}
        means = {"loss": total["loss"] / total["weight"], "mean_token_accuracy": total["hits"] / total["targets"]}
        if "entropy" in total:
            means["entropy"] = total["entropy"] / total["targets"]
        if "router" in total:
            means["aux_loss"] = total["router"] / total["weight"]
        return means
