"""Batches of the collator, compared value by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sft.batches.collator import DataCollatorForSFT
from sft.labels import IGNORE_INDEX

X = IGNORE_INDEX
ROWS = [{"input_ids": [1, 2, 3], "labels": [X, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
PACKED = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [X, 2, 3, 4, 5], "seq_lengths": [3, 2]},
    {"input_ids": [6, 7], "labels": [6, 7], "seq_lengths": [2]},
]


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_padded_batch_is_padded_on_the_right_and_padding_is_not_trained() -> None:
    assert as_lists(DataCollatorForSFT(pad_token_id=9)(ROWS)) == {
        "input_ids": [[1, 2, 3], [4, 5, 9]],
        "labels": [[X, 2, 3], [4, 5, X]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }


def test_flat_batch_is_one_row_with_positions_restarting_and_first_labels_ignored() -> None:
    assert as_lists(DataCollatorForSFT(pad_token_id=9, padding_free=True)(ROWS)) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[X, 2, 3, X, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "seq_lengths": [3, 2],
    }


def test_packed_rows_are_joined_with_their_documents_kept_apart() -> None:
    assert as_lists(DataCollatorForSFT(pad_token_id=9)(PACKED)) == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7]],
        "labels": [[X, 2, 3, X, 5, X, 7]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
        "seq_lengths": [3, 2, 2],
    }


def test_collating_leaves_the_rows_untouched() -> None:
    row = {"input_ids": np.array([1, 2]), "labels": np.array([1, 2])}
    DataCollatorForSFT(pad_token_id=9, padding_free=True)([row])
    assert row["labels"].tolist() == [1, 2]


def test_multiple_adds_padding_or_an_untrained_document() -> None:
    padded = DataCollatorForSFT(pad_token_id=9, pad_to_multiple_of=4)(ROWS)
    assert padded["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 9, 9]]
    flat = DataCollatorForSFT(pad_token_id=9, padding_free=True, pad_to_multiple_of=4)(ROWS)
    assert as_lists(flat) == {
        "input_ids": [[1, 2, 3, 4, 5, 9, 9, 9]],
        "labels": [[X, 2, 3, X, 5, X, X, X]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2]],
        "seq_lengths": [3, 2, 3],
    }


def test_loss_weights_are_one_where_a_row_has_none_and_zero_on_padding() -> None:
    rows = [{**ROWS[0], "loss_weights": [0.0, 0.5, 2.0]}, ROWS[1]]
    padded = DataCollatorForSFT(pad_token_id=9)(rows)
    assert padded["loss_weights"].tolist() == [[0.0, 0.5, 2.0], [1.0, 1.0, 0.0]]
    flat = DataCollatorForSFT(pad_token_id=9, padding_free=True)(rows)
    assert flat["loss_weights"].tolist() == [[0.0, 0.5, 2.0, 1.0, 1.0]]
    assert flat["loss_weights"].dtype == torch.float32


def test_labels_default_to_the_tokens_and_masks_restrict_them() -> None:
    rows = [
        {"input_ids": [1, 2, 3]},
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
    ]
    assert DataCollatorForSFT(pad_token_id=9)(rows)["labels"].tolist() == [[1, 2, 3], [X, 2, X]]


def test_padded_batches_have_position_ids_on_request() -> None:
    batch = DataCollatorForSFT(pad_token_id=9, return_position_ids=True)(ROWS)
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_rows_may_be_lists_arrays_or_tensors(kind: Any) -> None:
    rows = [{name: kind(values) for name, values in row.items()} for row in PACKED]
    assert as_lists(DataCollatorForSFT(pad_token_id=9)(rows)) == as_lists(DataCollatorForSFT(pad_token_id=9)(PACKED))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a"}, "row 1 of the batch has no 'input_ids', only \\['text'\\]"),
        ({"input_ids": []}, "row 1 of the batch has no tokens"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' of row 1 of the batch has 1 values for 2 input_ids"),
        ({"input_ids": [1, 2], "loss_weights": [1]}, "'loss_weights' of row 1 of the batch has 1 values"),
        ({"input_ids": [1, 2], "seq_lengths": [1]}, "'seq_lengths' of row 1 of the batch are \\[1\\] for 2 input_ids"),
        ({"input_ids": [1, 2], "seq_lengths": [2, 0]}, "must be positive"),
    ],
)
def test_malformed_rows_are_refused_with_their_position_in_the_batch(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DataCollatorForSFT(pad_token_id=9)([PACKED[0], row])


def test_padding_in_the_rows_is_neither_attended_to_nor_trained() -> None:
    rows = [
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [7, 8, 9, 0], "labels": [7, 8, 9, 0], "attention_mask": [1, 1, 1, 0]},
    ]
    padded = DataCollatorForSFT(pad_token_id=0)(rows)
    assert padded["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded["labels"].tolist() == [[5, 6, IGNORE_INDEX], [7, 8, 9]]
    flat = DataCollatorForSFT(pad_token_id=0, padding_free=True)(rows)
    assert flat["seq_lengths"].tolist() == [2, 3]


def test_padding_inside_a_packed_row_is_not_trained() -> None:
    row = {"input_ids": [5, 6, 0, 7, 8], "attention_mask": [1, 1, 0, 1, 1], "seq_lengths": [3, 2]}
    batch = DataCollatorForSFT(pad_token_id=0)([row])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, IGNORE_INDEX, IGNORE_INDEX, 8]]


def test_rows_padded_on_the_left_have_positions_from_their_first_token_and_no_target_after_padding() -> None:
    collator = DataCollatorForSFT(0, padding_side="left", return_position_ids=True)
    batch = collator([{"input_ids": [5, 6], "loss_weights": [1.0, 2.0]}, {"input_ids": [7, 8, 9]}])
    assert batch["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["loss_weights"].tolist() == [[0, 1, 2], [1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
