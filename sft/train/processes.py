"""Rows shared out evenly among processes: what fills the last batches up is not trained, counted or evaluated.

Every process must take the same number of steps. accelerate fills the last batches up with rows from the beginning of
the epoch, which are then trained twice and weigh twice in an evaluation. Here they are filled up with rows in which
nothing is trained, so that any number of processes makes the updates that one process makes.

FSDP2 wherever torch has it: accelerate turns it on for GPUs alone, `fully_shard` works over gloo as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import Dataset, RandomSampler, Sampler

from sft.inner_model import causal_lm
from sft.labels import IGNORE_INDEX


def turn_on_fsdp2(accelerator: Any) -> bool:
    """Turn FSDP2 on where a launcher asks for it (`ACCELERATE_USE_FSDP`) and accelerate, on a CPU, did not heed it.

    Left alone, each process would silently hold the whole model.

    Args:
        accelerator: `accelerate.Accelerator`, before anything was prepared with it.

    Returns:
        Whether it was turned on here.

    Raises:
        ValueError: FSDP1 is asked for, which torch has for accelerators only.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} needs GPUs, and these processes run on a CPU; set fsdp_version: 2 in "
            "the accelerate configuration"
        )
    # accelerate copies the one into the other whenever it looks at its state
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return True


def without_copies(model: Any, weights: dict[str, Any] | None) -> dict[str, Any] | None:
    """Weights that were gathered for saving, each tied one once: gathering made copies, which would all be written.

    Args:
        model: Sharded or not, with or without an adapter.
        weights: Name -> tensor; None where the model is saved from its own weights.
    """
    tied = getattr(causal_lm(model), "all_tied_weights_keys", None) or {}
    if weights is None:
        return None
    return {name: value for name, value in weights.items() if not (name in tied and tied[name] in weights)}


FILLER = "filler"
"""Key of a row that only fills up a batch, and of a batch that consists of nothing else."""


class EvenRows(Dataset):
    """Rows and, behind them, as many fillers as make their number a multiple; a filler is the first row, marked.

    Args:
        dataset: Rows that are mappings.
        multiple: Rows of all processes in one step.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.total_dataset_length = len(dataset)  # accelerate reads it where it drops what was gathered of fillers
        self._num_rows = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Any:
        if index < self.total_dataset_length:
            return self.dataset[index]
        return {**self.dataset[0], FILLER: True}


class EvenOrder(Sampler):
    """The order of the rows, and after them the fillers.

    Args:
        order: Sampler of the rows; a random one is made the one that accelerate makes of it for a single process.
        rows: What is sampled.
        epoch: The epoch that the training is in. accelerate does not tell a sampler when batches are skipped.
        seed: Of the random order; None = torch's own.
    """

    def __init__(self, order: Sampler, rows: EvenRows, epoch: Callable[[], int], seed: int | None) -> None:
        if isinstance(order, RandomSampler):
            order = SeedableRandomSampler(
                order.data_source,
                replacement=order.replacement,
                num_samples=order._num_samples,
                generator=torch.Generator(),
                data_seed=seed,
            )
        self.order, self.rows, self.epoch = order, rows, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(self.epoch())
        yield from self.order
        yield from range(self.rows.total_dataset_length, len(self.rows))


@dataclass
class EvenCollator:
    """Joins the rows of a batch without its fillers; a batch of fillers alone is one row in which nothing is trained.

    Attributes:
        collator: Joins rows.
        keep_rows: Leave fillers in, untrained: where logits are gathered, all processes need as many rows.
    """

    collator: Callable[[list[Any]], Any]
    keep_rows: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        rows = [{name: value for name, value in row.items() if name != FILLER} for row in features]
        places = [place for place, row in enumerate(features) if FILLER in row]
        if not places:
            return self.collator(rows)
        if self.keep_rows:
            batch = self.collator(rows)
            if len(batch["labels"]) == len(rows):  # not so in a flat batch, whose logits are one row anyway
                batch["labels"][places] = IGNORE_INDEX
                return batch
        if len(places) < len(rows):
            return self.collator([row for place, row in enumerate(rows) if place not in places])
        batch = self.collator(rows[:1])
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return {**batch, FILLER: torch.ones(1)}


def can_be_filled(dataset: Any, *, drop_last: bool) -> bool:
    """Whether fillers can stand behind the rows of a data set.

    Args:
        dataset: Of a training or an evaluation.
        drop_last: Whether incomplete batches are left out anyway.
    """
    if drop_last or isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        return False
    return len(dataset) > 0 and isinstance(dataset[0], Mapping)
