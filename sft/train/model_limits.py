"""Rows that a model can't take: token ids without an embedding, documents beyond the positions that it has learned."""

from __future__ import annotations

import re
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from torch import nn

from sft.config import DEFAULT_MAX_LENGTH, SFTConfig
from sft.inner_model import causal_lm
from sft.tokens.constant_length import ConstantLengthDataset

ROWS_AT_A_TIME = 10_000
# `wpe` of GPT-2, `embed_positions` of OPT; GPT-J and CodeGen have a buffer of that name
_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|pos_emb\w*)$")
_SPARE_ROWS = 2  # OPT's table begins with rows that stand for no position


def check_token_ids(model: Any, *data: Any) -> None:
    """Refuse token ids that the model's embeddings have no row for; streams are not read for it.

    Args:
        model: Wrapped or not.
        data: Data sets, dicts of them, or None.

    Raises:
        ValueError: Names the id, its row, and how many ids there are.
    """
    num_tokens = causal_lm(model).get_input_embeddings().weight.shape[0]
    for dataset in data:
        if isinstance(dataset, dict):
            check_token_ids(model, *dataset.values())
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or num_tokens == 0:
            continue
        batches = dataset.select_columns("input_ids").with_format("arrow").iter(ROWS_AT_A_TIME)
        for number, batch in enumerate(batches):
            ids = pc.list_flatten(batch["input_ids"])
            bounds = pc.min_max(ids).as_py()
            wrong = [value for value in (bounds["max"], bounds["min"]) if value is not None]
            wrong = [value for value in wrong if not 0 <= value < num_tokens]
            if wrong:
                place = pc.index(ids, wrong[0]).as_py()
                row = number * ROWS_AT_A_TIME + pc.list_parent_indices(batch["input_ids"])[place].as_py()
                raise ValueError(
                    f"row {row} has the token id {wrong[0]}, and the model has embeddings for {num_tokens} tokens; "
                    "tokenize with the model's own tokenizer, or resize its embeddings"
                )


def num_positions(model: Any) -> int | None:
    """Positions that a model has a table for; None where it computes them (rotary), which has no end."""
    base = causal_lm(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    modules = [module for _, module in _tables(base.named_modules()) if isinstance(module, nn.Embedding)]
    sizes = [module.num_embeddings for module in modules]
    sizes += [len(buffer) for _, buffer in _tables(base.named_buffers())]
    return limit if any(limit <= size <= limit + _SPARE_ROWS for size in sizes) else None


def _tables(named: Any) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in named if _TABLE.search(name)]


def check_positions(model: Any, config: SFTConfig, *data: Any) -> None:
    """Refuse documents that are longer than the positions that the model has learned.

    Args:
        model: Wrapped or not.
        config: `max_length`, which is all that is known of streamed rows.
        data: Prepared data sets, dicts of them, or None.

    Raises:
        ValueError: Names the length, its row where there is one, the model's positions and the option to set.
    """
    limit = num_positions(model)
    if limit is None:
        return
    for dataset in data:
        if isinstance(dataset, dict):
            check_positions(model, config, *dataset.values())
            continue
        length, where = _longest(dataset, config)
        if length > limit:
            raise ValueError(
                f"{where}, and the model ({causal_lm(model).config.model_type}) has learned {limit} positions: set "
                f"max_length={limit}, or less"
            )


def _longest(dataset: Any, config: SFTConfig) -> tuple[int, str]:
    """The longest document of a data set, or that it may have, and where in words."""
    if isinstance(dataset, ConstantLengthDataset):
        return dataset.seq_length, f"documents of up to seq_length={dataset.seq_length} tokens are packed"
    if isinstance(dataset, IterableDataset) and not config.skip_prepare_dataset:
        length = config.max_length or DEFAULT_MAX_LENGTH
        return length, f"rows are streamed, with up to max_length={length} tokens"
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return 0, ""
    packed = "seq_lengths" in dataset.column_names
    longest, row = 0, 0
    column = "seq_lengths" if packed else "input_ids"
    for number, batch in enumerate(dataset.select_columns(column).with_format("arrow").iter(ROWS_AT_A_TIME)):
        lengths = pc.list_flatten(batch[column]) if packed else pc.list_value_length(batch[column])
        found = pc.max(lengths).as_py() or 0
        if found > longest:
            place = pc.index(lengths, found).as_py()
            place = pc.list_parent_indices(batch[column])[place].as_py() if packed else place
            longest, row = found, number * ROWS_AT_A_TIME + place
    return longest, f"row {row} has a document of {longest} tokens"
