"""Training in several processes: rows distributed evenly, FSDP2 on CPUs, and tied weights saved once.

All processes must make the same number of steps. accelerate fills the last batches with rows from the beginning of the
epoch, which are then trained twice and count twice in an evaluation. `EvenRows` fills them with rows in which nothing
is trained, counted or evaluated, so that any number of processes makes the same updates as one process.
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

from sft.batches.layout import FILLER
from sft.inner_model import causal_lm
from sft.labels import IGNORE_INDEX


class EvenRows(Dataset):
    """Rows and, after them, fillers up to a multiple; a filler is a copy of the first row, marked by `FILLER`.

    Args:
        dataset: Rows that are mappings.
        multiple: Rows that all processes together use in one step.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.total_dataset_length = len(dataset)  # accelerate truncates gathered results to it
        self._num_rows = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Any:
        if index < self.total_dataset_length:
            return self.dataset[index]
        return {**self.dataset[0], FILLER: True}


class EvenOrder(Sampler):
    """Sampler of rows in a given order, and after them of the fillers.

    Args:
        order: Sampler of the rows. A random one is replaced by accelerate's, so that the order is that of one process.
        rows: The rows with their fillers.
        epoch: Returns the present epoch, since accelerate does not set it in a sampler when batches are skipped.
        seed: Seed of a random order; None = torch's global generator.
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
    """Collator that drops fillers; of a batch of fillers alone, it makes one row in which nothing is trained.

    Attributes:
        collator: Collator of the remaining rows.
        keep_rows: Keep fillers, with masked labels: where logits are gathered, all processes need the same number of
            rows.
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
            if len(batch["labels"]) == len(rows):  # a flat batch is one row anyway
                batch["labels"][places] = IGNORE_INDEX
                return batch
        if len(places) < len(rows):
            return self.collator([row for place, row in enumerate(rows) if place not in places])
        batch = self.collator(rows[:1])
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return {**batch, FILLER: torch.ones(1)}


def can_be_filled(dataset: Any, *, drop_last: bool) -> bool:
    """Return whether fillers can be added to a data set: it has a length, and its rows are mappings.

    Args:
        dataset: Training or evaluation rows.
        drop_last: Whether incomplete batches are dropped, so that fillers are not needed.
    """
    if drop_last or isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        return False
    return len(dataset) > 0 and isinstance(dataset[0], Mapping)


def turn_on_fsdp2(accelerator: Any) -> bool:
    """Turn on FSDP2 on CPUs, if the launcher asks for FSDP (`ACCELERATE_USE_FSDP`).

    accelerate ignores the request there, and each process would have a copy of the complete model. torch's
    `fully_shard` works over gloo as well.

    Args:
        accelerator: `accelerate.Accelerator`, before anything was prepared with it.

    Returns:
        Whether FSDP2 was turned on by this function.

    Raises:
        ValueError: The launcher asks for FSDP1, which torch has for accelerators only.
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
    # set both: accelerate copies the first into the second whenever it reads its state
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return True


def without_copies(model: Any, weights: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove the copies of tied weights that gathering for a checkpoint makes, so that each is written once.

    Args:
        model: Sharded or not, with or without an adapter.
        weights: Gathered weights by name; None if the model is saved from its own weights.

    Returns:
        The weights without copies; None for None.
    """
    tied = getattr(causal_lm(model), "all_tied_weights_keys", None) or {}
    if weights is None:
        return None
    return {name: value for name, value in weights.items() if not (name in tied and tied[name] in weights)}
