"""Rows that are already tokenized: labels, a check for a double bos token, and the length limit of streams."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from sft.data.records import Kind, normalize
from sft.labels import IGNORE_INDEX, TOKEN_MASKS

logger = logging.getLogger(__name__)


def labels_of_tokens(
    batch: Mapping[str, list[Any]], indices: list[int], masks: Sequence[str] = TOKEN_MASKS
) -> dict[str, list[Any]]:
    """Return ids and labels of rows that are already tokenized.

    Where all masks of the row are 1, the label is the row's own label or, without labels, the id. Elsewhere it is
    `IGNORE_INDEX`.
    Padding, where `attention_mask` is 0, is removed: it would otherwise be trained, and fill packed rows.

    Args:
        batch: Lists of values by column: `input_ids` and optionally `labels`, `attention_mask` and masks.
        indices: Row numbers for messages.
        masks: Columns of zeros and ones to apply, in rows that have them.

    Returns:
        `input_ids` without padding, and `labels` of the same lengths.

    Raises:
        ValueError: A row is empty, or its columns differ in length; the error names the row.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = [_read(row, number, masks) for number, row in zip(indices, rows, strict=True)]
    return {"input_ids": [ids for ids, _ in read], "labels": [labels for _, labels in read]}


def _read(row: Mapping[str, Any], row_number: int, masks: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the ids and the labels of one row, without padding."""
    try:
        record = normalize(row, Kind.TOKENIZED)
    except ValueError as error:
        raise ValueError(f"row {row_number}: {error}") from error
    ids = record["input_ids"]
    if not len(ids):
        raise ValueError(f"row {row_number} has no input_ids")
    labels = record.get("labels", ids)
    given = [record[name] for name in masks if name in record]
    if given:
        keep = (all(marks) for marks in zip(*given, strict=True))
        labels = [label if kept else IGNORE_INDEX for label, kept in zip(labels, keep, strict=True)]
    attended = row.get("attention_mask")
    if attended is None or all(attended):
        return ids, labels
    if len(attended) != len(ids):
        raise ValueError(f"row {row_number}: attention_mask has {len(attended)} values for {len(ids)} input_ids")
    return list(compress(ids, attended)), list(compress(labels, attended))


def supervised(labels: Sequence[int]) -> bool:
    """Return whether a row has a target; its first label is not one, since there is no token to predict it from."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def warn_of_double_bos(rows: Iterable[Any], bos_token_id: int | None, name: str) -> int:
    """Count rows that begin with two beginning-of-sequence tokens, and log a warning if there are any.

    Such rows result from a template that prints the token and a tokenizer that adds it; base models are not trained on
    them.

    Args:
        rows: Token ids of each row.
        bos_token_id: Id of the token; None if the tokenizer has none.
        name: Name of the data set in the message.

    Returns:
        The number of such rows.
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


class StreamLimit:
    """Truncate the rows of a stream, drop those in which nothing is trained, and log the counts of both.

    Args:
        max_length: Limit in tokens.
        name: Name of the data set in messages.
        keep_end: Whether the end of a too long row is kept instead of its beginning.
    """

    def __init__(self, max_length: int, name: str, *, keep_end: bool = False) -> None:
        self.max_length = max_length
        self.kept = slice(-max_length, None) if keep_end else slice(max_length)
        self.name = name
        self.num_rows = self.num_cut = self.num_left_out = 0
        self._num_logged = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Apply the limit to a batch.

        Raises:
            ValueError: Nothing is trained in any row so far, which means that options or masks are wrong.
        """
        cut = {name: [values[self.kept] for values in column] for name, column in batch.items()}
        kept = [place for place, labels in enumerate(cut["labels"]) if supervised(labels)]
        self.num_rows += len(cut["labels"])
        self.num_cut += sum(len(ids) > self.max_length for ids in batch["input_ids"])
        self.num_left_out += len(cut["labels"]) - len(kept)
        if self.num_left_out == self.num_rows:
            raise ValueError(nothing_trained(self.name, f"the first {self.num_rows}", self.max_length))
        self._log()
        return {name: [column[place] for place in kept] for name, column in cut.items()}

    def _log(self) -> None:
        """Log at the first row, and again whenever the count has doubled, since a stream may have millions of rows."""
        if self.num_cut + self.num_left_out < max(1, 2 * self._num_logged):
            return
        self._num_logged = self.num_cut + self.num_left_out
        logger.warning(
            "%s data: limit of %d tokens: %d truncated, %d dropped without trained tokens, of %d rows so far",
            self.name,
            self.max_length,
            self.num_cut,
            self.num_left_out,
            self.num_rows,
        )


def nothing_trained(name: str, rows: str, max_length: int) -> str:
    """Return the error message for a data set without any trained token.

    Args:
        name: Name of the data set.
        rows: Which rows were checked, such as "the first 1000".
        max_length: The length limit in tokens.
    """
    return (
        f"no trainable token in any of {rows} {name} rows at max_length={max_length}: look at the masks with "
        "sft.preview_masks, raise max_length, or check completion_only_loss and assistant_only_loss"
    )
