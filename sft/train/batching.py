"""How rows become batches: which data sets are packed, which collator joins rows, which process reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerBase

from sft.batches.collator import DataCollatorForSFT
from sft.config import SFTConfig


@dataclass(frozen=True)
class Packing:
    """Which data sets are packed, and whether batches are one flat row without padding; None = not decided yet."""

    train: bool
    eval: bool
    flat: bool | None


def take_over_collator(collator: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """This library's collator in place of transformers' own ones for token rows; any other one is handed back.

    `DataCollatorForLanguageModeling` fails on rows with labels, and puts its own in their place. A flat row of
    `DataCollatorWithFlattening` does not say where its documents end.

    Args:
        collator: As it was given to the trainer.
        tokenizer: Its padding token fills batches.

    Raises:
        ValueError: Masked language modelling was asked for.
    """
    if type(collator) is DataCollatorWithFlattening:
        return DataCollatorForSFT(tokenizer.pad_token_id, padding_free=True)
    if type(collator) is not DataCollatorForLanguageModeling:
        return collator
    if collator.mlm:
        raise ValueError(
            "DataCollatorForLanguageModeling has mlm=True, which hides tokens for a model that reads in both "
            "directions; a causal model needs mlm=False, or leave data_collator out"
        )
    return DataCollatorForSFT(tokenizer.pad_token_id, pad_to_multiple_of=collator.pad_to_multiple_of)


def choose_packing(config: SFTConfig, data_collator: Any, datasets: list[Any]) -> Packing:
    """Decide which data sets are packed and whether batches are flat.

    Args:
        config: `packing`, `eval_packing`, `padding_free`.
        data_collator: The user's own, or None.
        datasets: All data sets; rows that are packed already make batches flat.
    """
    eval_packing = config.packing if config.eval_packing is None else config.eval_packing
    packed = config.packing or eval_packing
    already = any("seq_lengths" in (getattr(dataset, "column_names", None) or ()) for dataset in datasets)
    flat = packed or already or config.padding_free or getattr(data_collator, "padding_free", False)
    undecided = data_collator is None and config.padding_free is None
    return Packing(config.packing, eval_packing, flat or (None if undecided else False))


def choose_collator(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, packing: Packing) -> DataCollatorForSFT:
    """The collator for token rows: flat batches where rows are packed or padding is unwanted, else padded ones."""
    return DataCollatorForSFT(
        pad_token_id=tokenizer.pad_token_id,
        padding_free=bool(packing.flat),
        pad_to_multiple_of=config.pad_to_multiple_of,
    )


def settle_dispatch(config: SFTConfig, packing: Packing, datasets_given: list[Any]) -> None:
    """On several processes, let each one read its own batches where batches can't be cut into equal parts.

    accelerate would have the first process read streamed batches and hand each process a slice of dimension 0, which
    in a flat batch is 1, and differs between rows of a stream that are padded batch by batch.

    Args:
        config: `accelerator_config.dispatch_batches` is set to False where it was left open.
        packing: Whether batches are flat.
        datasets_given: All data sets.

    Raises:
        ValueError: It was set to True, and batches are flat.
    """
    streamed = any(
        isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)) for dataset in datasets_given
    )
    accelerator = config.accelerator_config
    if packing.flat and accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config has dispatch_batches=True, but flat batches (packing, padding_free) are one row and "
            "can't be divided among processes; leave it out"
        )
    if (packing.flat is not False or streamed) and accelerator.dispatch_batches is None:
        accelerator.dispatch_batches = False
