"""Collators that would train a model wrong are found before training."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from sft.collators import DataCollatorForSFT
from sft.completion_collator import DataCollatorForCompletionOnlyLM
from sft.pitfalls import check_collator
from tests.tiny import tiny_tokenizer


def rows(tokenizer: Any, *texts: str) -> Dataset:
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})


def test_collator_that_masks_the_end_with_the_padding_is_refused() -> None:
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(ValueError, match=r"pad_token and eos_token are both '<\|im_end\|>'"):
        check_collator(collator, rows(tokenizer, "Hello<|im_end|>", "Hi<|im_end|>"), tokenizer)


def test_other_padding_or_masking_by_place_passes() -> None:
    same, other = tiny_tokenizer(pad_token="<|im_end|>"), tiny_tokenizer()
    check_collator(DataCollatorForSFT(same.pad_token_id), rows(same, "Hello<|im_end|>", "Hi, you<|im_end|>"), same)
    check_collator(DataCollatorForLanguageModeling(other, mlm=False), rows(other, "Hello<|im_end|>"), other)
    check_collator(DataCollatorForLanguageModeling(same, mlm=False), rows(same, "cut off"), same)


def test_end_that_doubles_as_padding_is_trained_by_the_trainers_own_collator() -> None:
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    end = tokenizer.eos_token_id
    batch = DataCollatorForSFT(end)([{"input_ids": [5, 6, 7, end]}, {"input_ids": [8, end]}])
    assert batch["labels"].tolist() == [[5, 6, 7, end], [8, end, -100, -100]]


def test_template_that_no_row_has_is_refused_and_one_row_is_enough() -> None:
    tokenizer = tiny_tokenizer()
    collator = DataCollatorForCompletionOnlyLM("Answer:", tokenizer=tokenizer)
    check_collator(collator, rows(tokenizer, "no", "Question: 1 Answer: 2"), tokenizer)
    with pytest.raises(ValueError, match=r"none of the 2 rows has response_template 'Answer:' = .*The first row is"):
        check_collator(collator, rows(tokenizer, "no", "neither"), tokenizer)


def test_streams_and_rows_of_other_shapes_are_left_alone() -> None:
    tokenizer = tiny_tokenizer()
    collator = DataCollatorForCompletionOnlyLM("Answer:", tokenizer=tokenizer)
    check_collator(collator, rows(tokenizer, "no").to_iterable_dataset(), tokenizer)
    check_collator(collator, Dataset.from_dict({"images": [1]}), tokenizer)
    check_collator(collator, None, tokenizer)
