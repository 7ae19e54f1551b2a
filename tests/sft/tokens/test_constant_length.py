"""A stream of full rows that loses at most one incomplete row and keeps its documents separate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import copy
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from sft.batches.collator import DataCollatorForSFT
from sft.tokens.constant_length import ConstantLengthDataset
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
TEXTS = [f"The quick brown fox number {number} jumps" for number in range(20)]


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def ids(*lengths: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[100 * i + j for j in range(n)] for i, n in enumerate(lengths, start=1)]})


def make(dataset: Any, **arguments: Any) -> ConstantLengthDataset:
    return ConstantLengthDataset(TOKENIZER, dataset, **{"seq_length": 4, "shuffle": False, **arguments})


def lists(rows: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def test_documents_are_joined_with_the_end_token_between_and_cut_into_full_rows() -> None:
    rows = list(make(ids(3, 2, 6)))
    assert lists(rows) == [[100, 101, 102, END], [200, 201, END, 300], [301, 302, 303, 304]]
    assert [row["seq_lengths"].tolist() for row in rows] == [[4], [3, 1], [4]]
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in rows)
    assert rows[0]["input_ids"].dtype == torch.int64


def test_concatenation_token_can_be_left_out_or_named() -> None:
    assert lists(make(ids(3, 2), append_concat_token=False)) == [[100, 101, 102, 200]]
    without_end = tiny_tokenizer(eos_token=None)
    stream = ConstantLengthDataset(without_end, ids(3), seq_length=4, eos_token_id=7)
    assert lists(stream) == [[100, 101, 102, 7]]


def test_the_remainder_of_a_buffer_is_carried_over_to_the_next() -> None:
    in_one = lists(make(ids(3, 2, 6, 5), num_of_sequences=100))
    assert lists(make(ids(3, 2, 6, 5), num_of_sequences=1)) == in_one
    assert len(in_one) == 20 // 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_length_is_the_number_of_rows_of_one_pass(shuffle: bool) -> None:
    stream = make(texts(), seq_length=16, num_of_sequences=2, shuffle=shuffle)
    assert len(stream) == len(list(stream)) == stream.current_size
    total = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in TEXTS)
    assert len(stream) == total // 16


def test_stream_without_a_length_has_none_here_either() -> None:
    with pytest.raises(TypeError):
        len(make(texts().to_iterable_dataset()))
    assert lists(make(texts().to_iterable_dataset())) == lists(make(texts()))


def test_infinite_stream_begins_again() -> None:
    stream = make(ids(3, 2), infinite=True)
    assert lists(islice(stream, 4)) == [
        [100, 101, 102, END],
        [200, 201, END, 100],
        [101, 102, END, 200],
        [201, END, 100, 101],
    ]
    with pytest.raises(ValueError, match="the data set is empty"):
        next(iter(make(Dataset.from_dict({"input_ids": []}), infinite=True)))


def test_shuffling_changes_the_order_and_follows_the_seed() -> None:
    plain = lists(make(texts(), seq_length=8))
    random.seed(0)
    first = lists(make(texts(), seq_length=8, shuffle=True))
    random.seed(0)
    assert lists(make(texts(), seq_length=8, shuffle=True)) == first != plain
    ordered = sorted(token for row in plain for token in row)
    assert abs(len(ordered) - len([token for row in first for token in row])) <= 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataset_text_field": "body"},
        {"formatting_func": lambda example: example["body"]},
        {"formatting_func": lambda example: [example["body"]]},
    ],
)
def test_text_comes_from_a_column_or_a_function(arguments: dict[str, Any]) -> None:
    source = texts().rename_column("text", "body")
    assert lists(make(source, **arguments)) == lists(make(texts()))


def test_special_tokens_are_added_on_request() -> None:
    class Tokenizer:
        eos_token_id = END

        def __call__(self, documents: list[str], add_special_tokens: bool, truncation: bool) -> dict[str, Any]:
            assert not truncation
            return {"input_ids": [[1, 8, 8] if add_special_tokens else [8, 8, 8] for _ in documents]}

    for add, expected in ((True, [1, 8, 8, END]), (False, [8, 8, 8, END])):
        stream = ConstantLengthDataset(Tokenizer(), texts(), seq_length=4, add_special_tokens=add, shuffle=False)
        assert lists(stream) == [expected] * 20


def test_buffer_size_counts_characters_or_tokens() -> None:
    assert make(texts(), seq_length=10, num_of_sequences=5, chars_per_token=2.0).max_buffer_size == 100
    assert make(ids(3), seq_length=10, num_of_sequences=5).max_buffer_size == 50


def test_nothing_is_read_before_it_is_needed() -> None:
    read: list[int] = []

    class Source:
        def __iter__(self) -> Iterator[dict[str, str]]:
            for number, text in enumerate(TEXTS):
                read.append(number)
                yield {"text": text}

    stream = make(Source(), num_of_sequences=1)
    assert read == []
    next(iter(stream))
    assert len(read) == 1


def test_workers_share_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    # no real workers: forking a process in which other tests started threads may kill them
    read = []
    for number in range(2):
        worker = SimpleNamespace(id=number, num_workers=2)
        monkeypatch.setattr("sft.tokens.constant_length.get_worker_info", partial(copy, worker))
        read += lists(make(ids(3, 3, 3, 3)))
    assert sorted(read) == [[number, number + 1, number + 2, END] for number in (100, 200, 300, 400)]


def test_rows_collate_into_one_flat_batch() -> None:
    batch = DataCollatorForSFT(pad_token_id=3)(list(make(ids(3, 2, 6))))
    assert batch["input_ids"].shape == (1, 12)
    assert batch["seq_lengths"].tolist() == [4, 3, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dataset_text_field": "text", "formatting_func": str}, "both given; choose one"),
        ({"seq_length": 0}, r"seq_length \(0\)"),
        ({"chars_per_token": 0.0}, r"chars_per_token \(0.0\) must be positive"),
    ],
)
def test_unusable_settings_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(texts(), **arguments)


def test_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"no column 'text', only \['body'\]; name the text column"):
        list(make(texts().rename_column("text", "body")))
