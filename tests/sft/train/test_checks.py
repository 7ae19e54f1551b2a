"""Collators that would train a model wrong are found before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForLanguageModeling

from sft.batches.collator import DataCollatorForSFT
from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
from sft.tokens.constant_length import ConstantLengthDataset
from sft.train.checks import check_collator
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer


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


def test_streams_and_rows_without_token_ids_are_not_checked() -> None:
    tokenizer = tiny_tokenizer()
    collator = DataCollatorForCompletionOnlyLM("Answer:", tokenizer=tokenizer)
    check_collator(collator, rows(tokenizer, "no").to_iterable_dataset(), tokenizer)
    check_collator(collator, Dataset.from_dict({"images": [1]}), tokenizer)
    check_collator(collator, None, tokenizer)


TEXTS = Dataset.from_dict({"text": ["Hello", "Hi, you"]})
TOKENS = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]})
SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def make(folder: Path, dataset: Any, collator: Any = None, **options: Any) -> SFTTrainer:
    config = quiet_config(folder, max_steps=1, max_length=32, **options)
    tokenizer = tiny_tokenizer()
    return SFTTrainer(
        tiny_model(), args=config, train_dataset=dataset, data_collator=collator, processing_class=tokenizer
    )


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return TOKENS[index]


@pytest.mark.parametrize(
    ("dataset", "options", "problem"),
    [
        (Rows(), {"shuffle_dataset": True}, r"shuffle_dataset=True would be ignored: the train data set .*\(Rows\)"),
        (TOKENS, {**SKIP, "assistant_only_loss": True}, "assistant_only_loss=True would be ignored"),
        (
            ConstantLengthDataset(tiny_tokenizer(), TEXTS, seq_length=4),
            {"completion_only_loss": True},
            r"completion_only_loss=True would be ignored: .*\(ConstantLengthDataset\)",
        ),
        (DatasetDict(train=TEXTS, test=TEXTS), {}, r"the splits \['test', 'train'\]; give one of them"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    dataset: Any, options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        make(tmp_path, dataset, **options)


def test_options_that_prepared_rows_already_follow_pass(tmp_path: Path) -> None:
    masked = TOKENS.add_column("completion_mask", [[0, 1, 1], [0, 1]])
    trainer = make(tmp_path, masked, **SKIP, completion_only_loss=True, padding_free=False)
    assert sorted(next(iter(trainer.get_train_dataloader()))["labels"].tolist()) == [[-100, 6, 7], [-100, 9, -100]]


@pytest.mark.parametrize("option", [{"padding_free": True}, {"pad_to_multiple_of": 8}])
def test_options_of_batches_belong_to_the_collator_that_makes_them(option: dict[str, Any], tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["Question: 1 Answer: 2"]})
    plain = DataCollatorForCompletionOnlyLM("Answer:", tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"would be ignored: DataCollatorForCompletionOnlyLM makes the batches"):
        make(tmp_path, texts, plain, **option)
    make(tmp_path, texts, DataCollatorForCompletionOnlyLM("Answer:", tokenizer=tiny_tokenizer(), **option), **option)


@pytest.mark.parametrize("streamed", [False, True])
def test_collator_that_forgets_borders_of_packed_documents_is_refused(streamed: bool, tmp_path: Path) -> None:
    def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    dataset: Any = TEXTS.to_iterable_dataset() if streamed else TEXTS
    with pytest.raises(ValueError, match="rows are packed, and stack drops their seq_lengths"):
        make(tmp_path, dataset, stack, packing=True)


@pytest.mark.parametrize("wrong", [100_000, -1])
def test_token_ids_that_the_model_has_no_embedding_for_are_named_with_their_row(tmp_path: Path, wrong: int) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10, wrong, 11]]})
    config = quiet_config(tmp_path)
    with pytest.raises(
        ValueError, match=rf"row 2 has the token id {wrong}, and the model has embeddings for \d+ tokens"
    ):
        SFTTrainer(tiny_model(), args=config, train_dataset=rows, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_loss_does_not_depend_on_the_side_that_is_padded(family: str, tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["Question: a Answer: one", "Question: how are you Answer: fine, thanks a lot"]})
    losses = []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer(padding_side=side, pad_token=None)
        trainer = SFTTrainer(
            tiny_model(family),
            args=quiet_config(tmp_path / side, max_steps=1, per_device_train_batch_size=2, save_strategy="no"),
            train_dataset=texts,
            data_collator=DataCollatorForCompletionOnlyLM(" Answer:", tokenizer=tokenizer),
            processing_class=tokenizer,
        )
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_packing_and_lengths_of_rows_that_are_not_prepared_warn_and_the_rows_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, TOKENS, **SKIP, packing=True)
    why = "the train data set goes to the collator as it is (skip_prepare_dataset)"
    assert f"packing=True has no effect: {why}, so that each of its rows is a document of its own" in caplog.text
    assert f"max_length=32 has no effect: {why}" in caplog.text
    assert trainer.train_dataset["input_ids"] == [[5, 6, 7], [8, 9]]
    plain = make(tmp_path / "plain", TOKENS, padding_free=False)
    assert trainer.train().training_loss == pytest.approx(plain.train().training_loss, rel=1e-5)


def test_rows_that_are_packed_already_need_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9]], "labels": [[5, 6, 7, 8, 9]], "seq_lengths": [[3, 2]]})
    trainer = make(tmp_path, packed, **SKIP, packing=True)
    assert "packing=True has no effect" not in caplog.text
    assert next(iter(trainer.get_train_dataloader()))["seq_lengths"].tolist() == [3, 2]


def test_transform_that_returns_token_rows_is_called_for_each_batch(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["Hello", "Hi, you"]})
    rows.set_transform(lambda batch: {"input_ids": [[5, 6, len(text)] for text in batch["text"]]})
    trainer = make(tmp_path, rows, **SKIP, padding_free=False)
    (batch,) = list(trainer.get_train_dataloader())
    assert sorted(batch["input_ids"].tolist()) == [[5, 6, 5], [5, 6, 7]]
    with pytest.raises(ValueError, match="assistant_only_loss=True would be ignored"):
        make(tmp_path, rows, **SKIP, assistant_only_loss=True)
