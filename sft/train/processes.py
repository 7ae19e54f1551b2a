"""Training in several processes: what they may divide, rows distributed evenly, FSDP2 on CPUs, tied weights saved once.

All processes must make the same number of steps. accelerate fills the last batches with rows from the beginning of the
epoch, which are then trained twice and count twice in an evaluation. `EvenRows` fills them with rows in which nothing
is trained, counted or evaluated, so that any number of processes makes the same updates as one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.data_loader import SeedableRandomSampler
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import TrainingArguments

from sft.batches.layout import FILLER
from sft.inner_model import causal_lm
from sft.labels import IGNORE_INDEX

PARALLELISM_VARIABLE = "ACCELERATE_USE_PARALLELISM_CONFIG"
"""Environment variable by which a launcher has accelerate read the sizes in `PARALLELISM_CONFIG_...`."""

LABELS = {"labels", "shift_labels"}
"""Keys of a batch that name the tokens to predict; see `sft.loss.targets.find_targets`."""

_WHOLE_ROWS = (
    "targets, loss weights and the ends of documents are found in whole rows. Set it to 1; longer rows fit with FSDP2, "
    "activation_checkpointing=True and per_device_train_batch_size=1"
)
_WHOLE_LAYERS = "the loss, LoRA and the fused layers read whole weights. Set it to 1, and divide the weights with FSDP2"

DIVIDED = {
    "cp_size": ("context parallelism divides each row among processes", _WHOLE_ROWS),
    "sp_size": ("sequence parallelism (ALST/Ulysses) divides each row among processes", _WHOLE_ROWS),
    "tp_size": ("tensor parallelism divides each layer among processes", _WHOLE_LAYERS),
}
"""Sizes of accelerate's `ParallelismConfig` that must be 1 -> what they do, and why it is not supported."""


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
                for name in LABELS & batch.keys():
                    batch[name][places] = IGNORE_INDEX
                return batch
        if len(places) < len(rows):
            return self.collator([row for place, row in enumerate(rows) if place not in places])
        batch = self.collator(rows[:1])
        masked = {name: torch.full_like(batch[name], IGNORE_INDEX) for name in LABELS & batch.keys()}
        return {**batch, **masked, FILLER: torch.ones(1)}


def can_be_filled(dataset: Any, *, drop_last: bool) -> bool:
    """Return whether fillers can be added to a data set: it has a length, and its rows are mappings.

    Args:
        dataset: Training or evaluation rows.
        drop_last: Whether incomplete batches are dropped, so that fillers are not needed.
    """
    if drop_last or isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        return False
    return len(dataset) > 0 and isinstance(dataset[0], Mapping)


def check_parallelism(config: TrainingArguments) -> None:
    """Check that processes divide rows of the data set and weights only, not single rows or the products of a layer.

    Both would go wrong without an error: a process that has a part of a row predicts no token of the next part, and
    `transformers.Trainer` adds `shift_labels` for that, which only its own loss functions read.

    Args:
        config: `parallelism_config`, which a launcher may give instead (`PARALLELISM_CONFIG_...`), or a script's own
            `Accelerator`; and DeepSpeed's options.

    Raises:
        ValueError: Context, sequence or tensor parallelism is asked for.
    """
    for where, parallelism in _parallelism_configs(config).items():
        if not isinstance(parallelism, ParallelismConfig):
            raise ValueError(
                f"{where}={parallelism!r} is not an accelerate.ParallelismConfig; give "
                "ParallelismConfig(dp_shard_size=...), or leave it out"
            )
        for name, (what, why) in DIVIDED.items():
            size = getattr(parallelism, name)
            if size > 1:
                raise ValueError(f"{where} has {name}={size}: {what}, and this trainer does not support it: {why}")
    deepspeed = getattr(getattr(config, "hf_deepspeed_config", None), "config", None) or {}
    size = deepspeed.get("tensor_parallel", {}).get("autotp_size", 0)
    if size > 1:
        what, why = DIVIDED["tp_size"]
        raise ValueError(
            f"the DeepSpeed configuration has tensor_parallel.autotp_size={size}: {what}, and this trainer does not "
            f"support it: {why}"
        )


def _parallelism_configs(config: TrainingArguments) -> dict[str, Any]:
    """Return the settings of parallelism that accelerate may follow, by the place that they come from."""
    launched = os.environ.get(PARALLELISM_VARIABLE, "false").lower() == "true"
    found = {
        "parallelism_config": config.parallelism_config,
        "the launcher's environment (PARALLELISM_CONFIG_...)": ParallelismConfig() if launched else None,
        # accelerate keeps the settings of the first Accelerator for all later ones
        "the Accelerator that the script made": AcceleratorState._shared_state.get("parallelism_config"),
    }
    return {where: parallelism for where, parallelism in found.items() if parallelism is not None}


def check_undivided(model: Any) -> None:
    """Check that a model was not divided among processes when it was loaded.

    Args:
        model: Wrapped or not.

    Raises:
        ValueError: It was loaded with `tp_plan`, `tp_size` or a `distributed_config`.
    """
    base = causal_lm(model)
    sizes = {name: getattr(base, name, None) or 1 for name in ("tp_size", "fsdp_size")}
    if max(sizes.values()) > 1 or getattr(base, "is_distributed_loading_by_transformers", False):
        stated = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"the model was divided among processes when it was loaded ({stated}): the loss, LoRA and the fused layers "
            "read whole weights. Load it without tp_plan, tp_size and distributed_config, and divide its weights with "
            "FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)"
        )


@contextmanager
def fsdp2_on_cpus(config: TrainingArguments) -> Iterator[Callable[[Any], bool]]:
    """Create an `Accelerator` inside the block, and turn on FSDP2 after it where a launcher asks for FSDP on CPUs.

    accelerate ignores `ACCELERATE_USE_FSDP` there, so that each process would have a copy of the complete model, and
    refuses any `ParallelismConfig`. torch's `fully_shard` works over gloo as well.

    Args:
        config: `parallelism_config`, which is set to None inside the block if FSDP is asked for on CPUs.

    Yields:
        A function that takes the accelerator, before anything was prepared with it, and returns whether it turned on
        FSDP2.

    Raises:
        ValueError: The launcher asks for FSDP1, which torch has for accelerators only.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or PartialState().distributed_type != DistributedType.MULTI_CPU:
        yield lambda _: False
        return
    given, launched = config.parallelism_config, os.environ.pop(PARALLELISM_VARIABLE, None)
    config.parallelism_config = None
    try:
        yield partial(
            _turn_on_fsdp2, parallelism=given or (ParallelismConfig() if (launched or "").lower() == "true" else None)
        )
    finally:
        config.parallelism_config = given
        if launched is not None:
            os.environ[PARALLELISM_VARIABLE] = launched


def _turn_on_fsdp2(accelerator: Any, parallelism: ParallelismConfig | None) -> bool:
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
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
    if parallelism is not None:
        accelerator.state.parallelism_config = parallelism
        accelerator.state.device_mesh = parallelism.get_device_mesh(accelerator.device.type)
        parallelism._validate_accelerator(accelerator)
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
