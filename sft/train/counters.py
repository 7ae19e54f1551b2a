"""Counters of a training: tokens seen, and sums of losses and hits between two log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sft.batches.layout import FILLER
from sft.loss.supervised import SupervisedLoss


class TokensSeen:
    """Counter of the tokens of batches. It is kept on the device, and nothing waits for it before `take`."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, inputs: Mapping[str, Any], *, padding: bool = False) -> None:
        """Count the tokens of a batch.

        A batch of fillers, which a process gets when its rows are used up (`sft.train.processes`), counts as 0.

        Args:
            inputs: The batch. A flat one has neither padding nor attention mask.
            padding: Count padding, too.
        """
        if FILLER in inputs:
            return
        mask, input_ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is not None and mask.dim() == 2 and not padding:
            self._count += mask.sum()
        elif input_ids is not None:
            self._count += input_ids.numel()

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> int:
        """Return the number of tokens since the last `take`, over all processes.

        Args:
            gather: Collects a tensor from all processes.
        """
        total = int(gather(self._count).sum())
        self._count.zero_()
        return total


class TokenTotals:
    """Sums of the figures of batches, from which means over tokens are made.

    The sums are kept on the device, and nothing waits for them before `sums` or `means`.

    Args:
        sums: Sums to start from, by name.
    """

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in (sums or {}).items()}

    def add(self, result: SupervisedLoss, *, skip_broken: bool = False) -> None:
        """Add the figures of a batch.

        Args:
            result: Loss and figures of the batch.
            skip_broken: Skip the batch if its loss is not finite.
        """
        figures = {
            "loss": result.loss_sum,
            "weight": result.weight,
            "hits": result.num_correct,
            "targets": result.num_targets,
            "entropy": result.entropy,
            "router": None if result.router_loss is None else result.router_loss * result.weight,
        }
        if result.groups is not None:
            for number, (loss, weight) in enumerate(result.groups):
                figures |= {f"loss {number}": loss, f"weight {number}": weight}
        finite = torch.isfinite(result.loss_sum) if skip_broken else None
        for name, value in figures.items():
            if value is not None:
                value = value if finite is None else torch.where(finite, value, 0)
                precise = value.double() if value.device.type in ("cpu", "cuda") else value.float()
                self._sums[name] = self._sums[name].to(precise) + precise if name in self._sums else precise

    def copy(self) -> TokenTotals:
        """Return a copy, to go back to if the next update is rejected."""
        other = TokenTotals()
        other._sums = dict(self._sums)  # the tensors can be shared: `add` makes new ones
        return other

    def sums(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """Return the sums by name, over all processes.

        Args:
            gather: Collects a tensor `(figures,)` from all processes into `(processes * figures,)`; None = this
                process's sums alone.
        """
        if not self._sums:
            return {}
        return dict(zip(self._sums, self._rows(gather).sum(0).tolist(), strict=True))

    def by_process(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[dict[str, float]]:
        """Return the sums by name of each process.

        Args:
            gather: As of `sums`.
        """
        if not self._sums:
            return []
        return [dict(zip(self._sums, row, strict=True)) for row in self._rows(gather).tolist()]

    def _rows(self, gather: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        """Return the sums as `(processes, figures)`."""
        sums = torch.stack(list(self._sums.values()))
        return (sums if gather is None else gather(sums)).reshape(-1, len(self._sums))

    def means(
        self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None, groups: Sequence[str] = ()
    ) -> dict[str, float]:
        """Return means over tokens: `loss`, `mean_token_accuracy` and, if they were added, `entropy` and `aux_loss`.

        Args:
            gather: As of `sums`.
            groups: Names of the groups that losses were added of, for `loss/NAME` of those with targets.

        Returns:
            Means by name; no entry if there were no targets.
        """
        total = self.sums(gather)
        if not total or not total["targets"]:
            return {}
        means = {"loss": total["loss"] / total["weight"], "mean_token_accuracy": total["hits"] / total["targets"]}
        if "entropy" in total:
            means["entropy"] = total["entropy"] / total["targets"]
        if "router" in total:
            means["aux_loss"] = total["router"] / total["weight"]
        for number, name in enumerate(groups):
            if total.get(f"weight {number}"):
                means[f"loss/{name}"] = total[f"loss {number}"] / total[f"weight {number}"]
        return means


class UnloggedFigures(TrainerCallback, ExportableState):
    """Callback that saves the sums since the last log line in checkpoints.

    With them, the first log line after a resume equals that of an uninterrupted training, bit for bit if the number
    of processes is the same: each process goes on from its own sums, so all are added in the same order.

    Args:
        sums: For each process, name of a figure -> its sum since the last log line.
    """

    def __init__(self, sums: list[dict[str, float]] | None = None) -> None:
        self.sums = sums or []

    def of_process(self, index: int, count: int) -> dict[str, float]:
        """Return the sums that one of `count` processes goes on from; the first has all if their number has changed."""
        if len(self.sums) == count:
            return self.sums[index]
        names = self.sums[0] if self.sums and index == 0 else ()
        return {name: sum(sums[name] for sums in self.sums) for name in names}

    def state(self) -> dict[str, dict[str, list[dict[str, float]]]]:
        """Return what `transformers.Trainer` writes into a checkpoint and constructs the callback from again."""
        return {"args": {"sums": self.sums}, "attributes": {}}
