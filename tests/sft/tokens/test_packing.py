"""Packing fills rows, keeps every token that the strategy should keep, and reports where each document went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.labels import IGNORE_INDEX
from sft.tokens import columns
from sft.tokens.packing import pack_dataset, pack_with_plan, plan_bfd, plan_rows, truncate_dataset

X = IGNORE_INDEX


def rows(*lengths: int, **further: Any) -> Dataset:
    """Documents 100.., 200.., 300.., the first label of each masked."""
    ids = [[100 * (number + 1) + place for place in range(length)] for number, length in enumerate(lengths)]
    labels = [[X, *document[1:]] if document else [] for document in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **further})


def test_best_fit_puts_each_document_where_it_leaves_least_room() -> None:
    assert plan_bfd([5, 3, 7, 2, 3], seq_length=10) == [[2, 1], [0, 4, 3]]


def test_equal_lengths_are_taken_in_order() -> None:
    assert plan_bfd([4, 4, 4, 4, 4], seq_length=8) == [[0, 1], [2, 3], [4]]


def test_no_documents_make_no_rows() -> None:
    assert plan_bfd([], seq_length=8) == []


@pytest.mark.parametrize("lengths", [[3, 9], [0, 2]])
def test_documents_that_cannot_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="1 documents do not fit rows of 8 tokens"):
        plan_bfd(lengths, seq_length=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120))
def test_every_document_is_in_exactly_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    plan = plan_bfd(lengths, seq_length=40)
    assert sorted(document for row in plan for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= 40 for row in plan)
    assert plan == plan_bfd(lengths, seq_length=40)
    bound = 11 / 9 * -(-sum(lengths) // 40) + 1 if lengths and max(lengths) <= 20 else len(lengths)
    assert len(plan) <= max(bound, len(lengths) and 1)


def test_documents_of_one_group_are_packed_next_to_each_other() -> None:
    lengths = np.array([30, 10, 20, 40, 25, 60])
    plan = plan_rows(columns.whole(lengths), 60, groups=np.array([1, 2, 1, 2, 3, 2]))
    rows = [part.tolist() for part in np.split(plan.pieces.document, plan.ends[:-1])]
    assert sorted(map(sorted, rows)) == [[0, 2], [1, 3], [4], [5]]
    alone = plan_rows(columns.whole(lengths), 60, groups=np.arange(6))
    assert alone.pieces.document.tolist() == plan_rows(columns.whole(lengths), 60).pieces.document.tolist()


def test_hundred_thousand_documents_fill_their_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 1.0, 100_000).astype(int), 1, 512)
    plan = plan_bfd(lengths, seq_length=512)
    assert lengths.sum() / (len(plan) * 512) > 0.995


def test_bfd_cuts_long_documents_and_packs_the_rest() -> None:
    packed, plan = pack_with_plan(rows(2, 7, 3), seq_length=5, strategy="bfd")
    assert plan == [[1], [2, 0]]
    assert packed.to_dict() == {
        "input_ids": [[200, 201, 202, 203, 204], [300, 301, 302, 100, 101]],
        "labels": [[X, 201, 202, 203, 204], [X, 301, 302, X, 101]],
        "seq_lengths": [[5], [3, 2]],
    }


def test_bfd_split_keeps_what_is_beyond_the_limit_as_another_document() -> None:
    packed, plan = pack_with_plan(rows(2, 7, 3), seq_length=5, strategy="bfd_split")
    assert plan == [[1], [2, 0], [1]]
    assert packed["input_ids"][:] == [[200, 201, 202, 203, 204], [300, 301, 302, 100, 101], [205, 206]]
    assert packed["seq_lengths"][:] == [[5], [3, 2], [2]]


def test_wrapped_keeps_the_order_and_divides_documents_at_full_rows() -> None:
    packed, plan = pack_with_plan(rows(2, 7, 3), seq_length=5, strategy="wrapped")
    assert plan == [[0, 1], [1, 2], [2]]
    assert packed["input_ids"][:] == [[100, 101, 200, 201, 202], [203, 204, 205, 206, 300], [301, 302]]
    assert packed["seq_lengths"][:] == [[2, 3], [4, 1], [2]]


def test_in_order_keeps_the_order_and_closes_a_row_where_the_next_document_does_not_fit() -> None:
    packed, plan = pack_with_plan(rows(2, 7, 3, 1, 2), seq_length=5, strategy="in_order")
    assert plan == [[0], [1], [2, 3], [4]]
    assert packed["input_ids"][:] == [[100, 101], [200, 201, 202, 203, 204], [300, 301, 302, 400], [500, 501]]
    assert packed["seq_lengths"][:] == [[2], [5], [3, 1], [2]]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "in_order", "wrapped"])
def test_empty_documents_and_empty_data_sets_are_packed(strategy: str) -> None:
    packed, plan = pack_with_plan(rows(0, 3, 0, 2, 0), seq_length=5, strategy=strategy)
    assert plan == [[1, 3]]
    assert packed["seq_lengths"][:] == [[3, 2]]
    empty, no_plan = pack_with_plan(rows(0), seq_length=5, strategy=strategy)
    assert (len(empty), no_plan) == (0, [])
    assert set(empty.column_names) == {"input_ids", "labels", "seq_lengths"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 23), max_size=40), st.integers(1, 9), st.sampled_from(["bfd_split", "wrapped"]))
def test_splitting_strategies_lose_no_token(lengths: list[int], seq_length: int, strategy: str) -> None:
    source = rows(*lengths) if lengths else Dataset.from_dict({"input_ids": [[]], "labels": [[]]})
    packed, plan = pack_with_plan(source, seq_length, strategy)
    given_ids = sorted(token for row in source["input_ids"] for token in row)
    assert sorted(token for row in packed["input_ids"] for token in row) == given_ids
    assert [sum(row) for row in packed["seq_lengths"]] == [len(row) for row in packed["input_ids"]]
    assert [len(row) for row in packed["seq_lengths"]] == [len(row) for row in plan]
    assert all(0 < len(row) <= seq_length for row in packed["input_ids"])


def test_labels_default_to_the_tokens_and_other_token_columns_travel_along() -> None:
    source = Dataset.from_dict(
        {
            "input_ids": [[1, 2], [3]],
            "loss_weights": [[0.0, 0.5], [1.0]],
            "completion_mask": [[0, 1], [1]],
            "name": ["a", "b"],
        }
    )
    packed = pack_dataset(source, 4)
    assert packed.to_dict() == {
        "input_ids": [[1, 2, 3]],
        "labels": [[1, 2, 3]],
        "completion_mask": [[0, 1, 1]],
        "loss_weights": [[0.0, 0.5, 1.0]],
        "seq_lengths": [[2, 1]],
    }


def test_selected_and_shuffled_data_sets_are_read_through_their_indices() -> None:
    source = rows(2, 3, 4).select([2, 0])
    assert pack_dataset(source, 8)["input_ids"][:] == [[300, 301, 302, 303, 100, 101]]


def test_data_sets_of_several_chunks_and_batches_are_packed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import concatenate_datasets

    source = rows(3, 4, 2, 5, 1, 6)
    chunks = concatenate_datasets(
        [source.select(range(2)).flatten_indices(), source.select(range(2, 6)).flatten_indices()]
    )
    expected = pack_dataset(source, 7).to_dict()
    monkeypatch.setattr(columns, "TOKENS_PER_BATCH", 7)
    assert pack_dataset(chunks, 7).to_dict() == expected


def test_data_set_on_disk_is_packed_to_disk_with_the_same_result_and_fingerprint(tmp_path: Path) -> None:
    source = rows(2, 7, 3)
    source.save_to_disk(str(tmp_path / "source"))
    from_disk = pack_dataset(load_from_disk(str(tmp_path / "source")), 5)
    in_memory = pack_dataset(source, 5)
    assert from_disk.cache_files
    assert not in_memory.cache_files
    assert from_disk.to_dict() == in_memory.to_dict()
    assert from_disk._fingerprint == in_memory._fingerprint != pack_dataset(source, 6)._fingerprint


def test_streams_are_packed_a_buffer_at_a_time() -> None:
    stream = rows(2, 7, 3).to_iterable_dataset()
    assert isinstance(pack_dataset(stream, 5), IterableDataset)
    assert list(pack_dataset(stream, 5)) == list(pack_dataset(rows(2, 7, 3), 5))
    by_two = list(pack_dataset(stream, 5, buffer_size=2))
    assert [row["seq_lengths"] for row in by_two] == [[5], [2], [3]]


def test_unknown_strategy_and_bad_length_are_refused() -> None:
    with pytest.raises(ValueError, match="'ffd' is unknown; use one of bfd, bfd_split, in_order, wrapped"):
        pack_dataset(rows(2), 5, "ffd")
    with pytest.raises(ValueError, match="seq_length must be at least 1, found 0"):
        pack_dataset(rows(2), 0)


def test_columns_that_disagree_in_length_are_refused_with_the_row() -> None:
    source = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3]]})
    with pytest.raises(ValueError, match="row 1: 'labels' has 1 values for 2 input_ids"):
        pack_dataset(source, 8)
    with pytest.raises(ValueError, match="tokenized data set with 'input_ids', found columns \\['text'\\]"):
        pack_dataset(Dataset.from_dict({"text": ["a"]}), 8)
    with pytest.raises(ValueError, match="'input_ids' must have a list of numbers"):
        pack_dataset(Dataset.from_dict({"input_ids": [1, 2]}), 8)


def test_truncating_cuts_all_token_columns_and_leaves_the_others() -> None:
    source = rows(2, 4, id=["a", "b"])
    assert truncate_dataset(source, 3).to_dict() == {
        "id": ["a", "b"],
        "input_ids": [[100, 101], [200, 201, 202]],
        "labels": [[X, 101], [X, 201, 202]],
    }
    assert truncate_dataset(source, 4) is source
    assert [row["labels"] for row in truncate_dataset(source.to_iterable_dataset(), 3)] == [[X, 101], [X, 201, 202]]
