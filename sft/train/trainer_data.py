"""The data sets of a trainer: each prepared and packed as its options say, at the start or when it is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from sft.config import SFTConfig
from sft.tokens.constant_length import constant_length_rows
from sft.train.batching import choose_packing
from sft.train.datasets import FormattingFunc, apply_formatting, prepare_dataset, resolve_max_length


def prepare_all(dataset: Any, *, name: str, **kwargs: Any) -> Any:
    """`prepare_rows` for one data set, for each of a dict of them, or for none."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: prepare_rows(rows, name=f"{name} {key}", **kwargs) for key, rows in dataset.items()}
    return prepare_rows(dataset, name=name, **kwargs)


def prepare_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    packing: bool,
    formatting_func: FormattingFunc | None,
    name: str,
) -> Any:
    """Prepare one data set; the options of `ConstantLengthDataset` have it packed in that way."""
    is_raw = isinstance(dataset, (Dataset, IterableDataset)) and not config.skip_prepare_dataset
    if not (packing and config.constant_length and is_raw):
        return prepare_dataset(dataset, tokenizer, config, packing=packing, formatting_func=formatting_func, name=name)
    if formatting_func is not None:
        dataset = apply_formatting(dataset, formatting_func, config)
    seq_length = resolve_max_length(config, tokenizer)
    return constant_length_rows(dataset, tokenizer, config, seq_length=seq_length, name=name)


def prepare_later(dataset: Any, config: SFTConfig, prepare: Callable[..., Any]) -> Any:
    """Rows for an evaluation of their own: prepared as the trainer's evaluation rows were, unless they are already.

    Args:
        dataset: As it was given to `evaluate` or `predict`; None and names are handed back.
        config: Whether evaluation rows are packed.
        prepare: `prepare_all` with the trainer's tokenizer, options and formatting function.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)) or "labels" in (dataset.column_names or ()):
        return dataset
    return prepare(dataset, packing=choose_packing(config, None, []).eval, name="eval")
