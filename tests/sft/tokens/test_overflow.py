"""Every token that a length limit removes is counted, per row."""

from __future__ import annotations

import pytest
from datasets import Dataset

from sft.labels import IGNORE_INDEX
from sft.tokens.packing import apply_overflow, pack_dataset, truncate_dataset

X = IGNORE_INDEX


def source() -> Dataset:
    return Dataset.from_dict(
        {
            "id": ["short", "long", "prompt fills it", "untrained", "empty", "answer first"],
            "input_ids": [[1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11], [12, 13], [], [14]],
            "labels": [[X, 2], [X, 4, 5, 6, 7], [X, X, X, 11], [X, X], [], [14]],
        }
    )


def test_truncate_cuts_and_leaves_out_rows_that_train_nothing() -> None:
    kept, report = apply_overflow(source(), max_length=3, policy="truncate")
    assert kept["id"][:] == ["short", "long"]
    assert kept["labels"][:] == [[X, 2], [X, 4, 5]]
    assert report.row_indices == {"truncated": [1], "split": [], "dropped": [], "masked": [2, 3, 4, 5]}
    assert (report.num_rows, report.num_truncated, report.num_dropped, report.num_tokens_lost) == (6, 1, 4, 9)
    assert report.tokens_lost == {1: 2, 2: 4, 3: 2, 4: 0, 5: 1}
    assert report.trained_tokens_lost == {1: 2, 2: 1, 3: 0, 4: 0, 5: 1}
    assert report.source_rows == [0, 1]
    assert report.summary() == ("limit of 3 tokens: 1 truncated (first: row 1), 4 masked (first: row 2); 9 tokens lost")


def test_split_makes_documents_of_the_rest() -> None:
    kept, report = apply_overflow(source(), max_length=3, policy="split")
    assert kept["id"][:] == ["short", "long", "long"]
    assert kept["input_ids"][:] == [[1, 2], [3, 4, 5], [6, 7]]
    assert report.row_indices == {"truncated": [], "split": [1], "dropped": [], "masked": [2, 3, 4, 5]}
    assert report.source_rows == [0, 1, 1]


def test_drop_leaves_out_whole_documents() -> None:
    kept, report = apply_overflow(source(), max_length=3, policy="drop")
    assert kept["id"][:] == ["short"]
    assert report.row_indices == {"truncated": [], "split": [], "dropped": [1, 2], "masked": [3, 4, 5]}
    assert report.num_tokens_lost == 12


def test_error_names_the_first_row_the_longest_and_the_ways_out() -> None:
    with pytest.raises(
        ValueError, match=r"2 rows are longer than 3 .* row 1 \(id 'long'\) with 5, the longest has 5\. Raise"
    ):
        apply_overflow(source(), max_length=3, policy="error")


def test_nothing_to_do_returns_the_same_data_set_and_an_empty_summary() -> None:
    fitting = source().select([0, 1])
    kept, report = apply_overflow(fitting, max_length=8)
    assert kept is fitting
    assert report.summary() == ""
    assert report.source_rows == [0, 1]


def test_without_labels_every_token_is_trained() -> None:
    kept, report = apply_overflow(Dataset.from_dict({"input_ids": [[1, 2, 3], []]}), max_length=2)
    assert kept["input_ids"][:] == [[1, 2]]
    assert report.masked == [1]


def test_rows_that_all_vanish_leave_an_empty_data_set_with_its_columns() -> None:
    kept, report = apply_overflow(source().select([3, 4]), max_length=2)
    assert len(kept) == 0
    assert set(kept.column_names) == {"id", "input_ids", "labels"}
    assert report.masked == [0, 1]


def test_unknown_policy_and_bad_limit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'cut' is unknown; use one of truncate, split, split_with_prompt, drop, error"
    ):
        apply_overflow(source(), 3, "cut")
    with pytest.raises(ValueError, match="max_length must be at least 1, found 0"):
        apply_overflow(source(), 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_attention_masks_are_cut_with_their_tokens(streamed: bool) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]], "attention_mask": [[0, 1, 1], [1] * 4, [1]]})
    cut = truncate_dataset(rows.to_iterable_dataset() if streamed else rows, 2)
    assert [(row["input_ids"], row["attention_mask"]) for row in cut] == [
        ([1, 2], [0, 1]),
        ([4, 5], [1, 1]),
        ([8], [1]),
    ]


def test_attention_masks_are_packed_with_their_tokens() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [0]]})
    assert pack_dataset(rows, 4, "bfd").to_dict()["attention_mask"] == [[1, 1, 1, 0]]
