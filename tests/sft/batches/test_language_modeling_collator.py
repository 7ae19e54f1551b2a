"""The collator under trl's name: its keys and labels, alone and in the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from sft.batches.language_modeling_collator import DataCollatorForLanguageModeling
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

ROWS = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_rows_are_padded_to_the_longest() -> None:
    assert lists(DataCollatorForLanguageModeling(pad_token_id=9)(ROWS)) == {
        "input_ids": [[1, 2, 3], [4, 5, 9]],
        "labels": [[1, 2, 3], [4, 5, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }


def test_position_ids_are_returned_if_asked_for_and_restart_with_each_document() -> None:
    collator = DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)
    rows = [{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}, {"input_ids": [6, 7]}]
    assert lists(collator(rows))["position_ids"] == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]


def test_masks_make_the_labels_of_rows_without_any() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]},
        {"input_ids": [4, 5], "completion_mask": [0, 1], "assistant_masks": [1, 0]},
    ]
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    assert lists(collator(rows))["labels"] == [[-100, 2, 3], [-100, -100, -100]]
    collator.completion_only_loss = False
    assert lists(collator(rows))["labels"] == [[1, 2, 3], [4, -100, -100]]


def test_labels_of_rows_are_used_as_they_are() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "completion_mask": [0, 0, 1]}]
    assert lists(DataCollatorForLanguageModeling(pad_token_id=0)(rows))["labels"] == [[-100, 2, 3]]


def test_rows_are_joined_without_padding() -> None:
    assert lists(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(ROWS)) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[-100, 2, 3, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
        "seq_idx": [[0, 0, 0, 1, 1]],
    }


def test_joined_rows_are_padded_to_a_multiple_by_tokens_at_position_0() -> None:
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=4)
    batch = lists(collator(ROWS))
    assert batch["input_ids"] == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch["position_ids"] == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["labels"] == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batch["cu_seq_lens_q"] == [0, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("column", ["seq_lengths", "position_ids"])
def test_documents_of_packed_rows_are_found_by_lengths_or_positions(column: str) -> None:
    values = {"seq_lengths": [3, 3], "position_ids": [0, 1, 2, 0, 1, 2]}[column]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = lists(collator([{"input_ids": [1, 2, 3, 4, 5, 6], column: values}, {"input_ids": [7]}]))
    assert batch["position_ids"] == [[0, 1, 2, 0, 1, 2, 0]]
    assert batch["labels"] == [[-100, 2, 3, -100, 5, 6, -100]]


def test_positions_that_do_not_count_from_0_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'position_ids' of row 0 of the batch are \[5, 6\]"):
        DataCollatorForLanguageModeling(pad_token_id=0)([{"input_ids": [1, 2], "position_ids": [5, 6]}])


def test_long_rows_are_truncated_at_either_end() -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5], "completion_mask": [0, 0, 1, 1, 1]}, {"input_ids": [6, 7]}]
    start = DataCollatorForLanguageModeling(pad_token_id=0, max_length=3)
    end = DataCollatorForLanguageModeling(pad_token_id=0, max_length=3, truncation_mode="keep_end")
    assert lists(start(rows))["labels"] == [[-100, -100, 3], [6, 7, -100]]
    assert lists(end(rows))["labels"] == [[3, 4, 5], [6, 7, -100]]


def test_documents_of_a_truncated_row_keep_their_borders() -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6], "seq_lengths": [2, 3, 1]}]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, max_length=4)
    assert lists(collator(rows))["position_ids"] == [[0, 1, 0, 1]]
    collator.truncation_mode = "keep_end"
    assert lists(collator(rows))["position_ids"] == [[0, 1, 2, 0]]


def test_bare_lists_of_token_ids_are_rows() -> None:
    assert lists(DataCollatorForLanguageModeling(pad_token_id=0)([[1, 2], [3]]))["labels"] == [[1, 2], [3, -100]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_mode": "middle"}, "truncation_mode='middle': use one of keep_start, keep_end"),
        ({"max_length": 1}, "at least 2 tokens"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorForLanguageModeling(pad_token_id=0, **options)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="return_tensors='np' is not supported"):
        DataCollatorForLanguageModeling(pad_token_id=0)(ROWS, return_tensors="np")


def test_in_the_trainer_losses_equal_those_without_it_and_documents_stay_apart(tmp_path: Any) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10, 11]}, {"input_ids": [5, 12]}])

    def loss(packing: bool, **collator: Any) -> float:
        given = DataCollatorForLanguageModeling(pad_token_id=3, **collator) if collator else None
        args = quiet_config(tmp_path, max_steps=1, per_device_train_batch_size=3, packing=packing, save_strategy="no")
        trainer = SFTTrainer(
            tiny_model(), args=args, train_dataset=rows, data_collator=given, processing_class=tiny_tokenizer()
        )
        return trainer.train().training_loss

    expected = loss(packing=False)
    assert loss(packing=False, padding_free=False) == pytest.approx(expected, abs=1e-6)
    assert loss(packing=False, padding_free=True) == pytest.approx(expected, abs=1e-6)
    assert loss(packing=True, padding_free=True) == pytest.approx(expected, abs=1e-6)
    assert loss(packing=True, padding_free=False) == pytest.approx(expected, abs=1e-6)
