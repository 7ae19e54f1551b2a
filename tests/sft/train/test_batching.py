"""Which data sets are packed, which collator joins their rows, and which process reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from sft.batches.collator import DataCollatorForSFT
from sft.config import SFTConfig
from sft.train.batches import Packing, choose_collator, choose_dispatch, choose_packing, take_over_collator
from tests.tiny import tiny_tokenizer

PADDED = Packing(train=False, eval=False, flat=False)
FLAT = Packing(train=True, eval=True, flat=True)


def config(**options: Any) -> SFTConfig:
    return SFTConfig(output_dir="out", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        ({}, Packing(train=False, eval=False, flat=None)),
        ({"padding_free": False}, PADDED),
        ({"packing": True}, FLAT),
        ({"packing": True, "eval_packing": False}, Packing(train=True, eval=False, flat=True)),
        ({"eval_packing": True}, Packing(train=False, eval=True, flat=True)),
        ({"padding_free": True}, Packing(train=False, eval=False, flat=True)),
    ],
)
def test_packing_of_both_data_sets(options: dict[str, Any], packing: Packing) -> None:
    assert choose_packing(config(**options), None, [None]) == packing


def test_rows_packed_already_make_batches_flat() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "seq_lengths": [[1, 1]]})
    assert choose_packing(config(), None, [None, rows]).flat
    assert choose_packing(config(), DataCollatorForSFT(0, padding_free=True), [None]).flat


def test_collator_pads_or_joins() -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    padded = choose_collator(config(pad_to_multiple_of=8), tiny_tokenizer(), PADDED)(rows)
    assert padded["input_ids"].shape == (2, 8)
    flat = choose_collator(config(), tiny_tokenizer(), FLAT)(rows)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8]]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("packing", "dataset", "dispatch"),
    [
        (PADDED, Dataset.from_dict({"text": ["a"]}), None),
        (FLAT, Dataset.from_dict({"text": ["a"]}), False),
        (PADDED, Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), False),
        (PADDED, Stream(), False),
        (Packing(train=False, eval=False, flat=None), Dataset.from_dict({"text": ["a"]}), False),
    ],
)
def test_each_process_reads_its_own_flat_or_streamed_batches(
    packing: Packing, dataset: Any, dispatch: bool | None
) -> None:
    args = config()
    choose_dispatch(args, packing, [dataset, None])
    assert args.accelerator_config.dispatch_batches is dispatch


def test_flat_batches_cannot_be_dispatched() -> None:
    with pytest.raises(ValueError, match="dispatch_batches=True"):
        choose_dispatch(config(accelerator_config={"dispatch_batches": True}), FLAT, [])


def test_collators_of_transformers_for_token_rows_are_taken_over() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}]
    padded = take_over_collator(DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=4), tokenizer)
    assert padded(rows)["labels"].tolist() == [[-100, 6, 7, -100], [8, 9, -100, -100]]
    flat = take_over_collator(DataCollatorWithFlattening(), tokenizer)
    assert choose_packing(config(), flat, [None]).flat
    assert flat(rows)["seq_lengths"].tolist() == [3, 2]
    own = DataCollatorForSFT(0)
    assert take_over_collator(own, tokenizer) is own
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    masked = DataCollatorForLanguageModeling(tokenizer, mlm=True)
    with pytest.raises(ValueError, match="has mlm=True"):
        take_over_collator(masked, tokenizer)
