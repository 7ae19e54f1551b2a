"""Rows that are token ids already: their labels, and a look at how they begin."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft.labels import IGNORE_INDEX
from sft.records import Kind, normalize

logger = logging.getLogger(__name__)


MASKS = ("completion_mask", "assistant_masks")


def labels_of_tokens(
    batch: Mapping[str, list[Any]], indices: list[int], masks: Sequence[str] = MASKS
) -> dict[str, list[Any]]:
    """Labels of rows that are tokenized already: their own, else the ids, where all masks are 1.

    Args:
        batch: Column -> values; `input_ids` and perhaps `labels` and masks.
        indices: Row numbers, for messages.
        masks: Columns of 0 and 1 that say what is trained, where a row has them.

    Returns:
        `input_ids` as they are, and `labels` of the same lengths.

    Raises:
        ValueError: A row is empty, or its columns differ in length; names the row.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return {
        "input_ids": batch["input_ids"],
        "labels": [_labels(row, number, masks) for number, row in zip(indices, rows, strict=True)],
    }


def _labels(row: Mapping[str, Any], row_number: int, masks: Sequence[str]) -> list[int]:
    try:
        record = normalize(row, Kind.TOKENIZED)
    except ValueError as error:
        raise ValueError(f"row {row_number}: {error}") from error
    if not record["input_ids"]:
        raise ValueError(f"row {row_number} has no input_ids")
    labels = record.get("labels", record["input_ids"])
    given = [record[name] for name in masks if name in record]
    if not given:
        return labels
    keep = (all(marks) for marks in zip(*given, strict=True))
    return [label if kept else IGNORE_INDEX for label, kept in zip(labels, keep, strict=True)]


def supervised(labels: Sequence[int]) -> bool:
    """Whether a row has a target; its first label is none, having nothing before it."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def warn_of_double_bos(rows: Iterable[Any], bos_token_id: int | None, name: str) -> int:
    """Count rows that begin with the beginning-of-sequence token twice, and say so in the log.

    A template that prints the token and a tokenizer that adds it make such rows; no model has seen them before.

    Args:
        rows: Token ids of each row.
        bos_token_id: None = there is no such token.
        name: What the message calls the data set.

    Returns:
        The count.
    """
    if bos_token_id is None:
        return 0
    twice = [number for number, ids in enumerate(rows) if list(ids[:2]) == [bos_token_id, bos_token_id]]
    if twice:
        logger.warning(
            "%s data: %d rows begin with the beginning-of-sequence token (%d) twice (first: row %d): tokenize text "
            "that has it already with add_special_tokens=False",
            name,
            len(twice),
            bos_token_id,
            twice[0],
        )
    return len(twice)
