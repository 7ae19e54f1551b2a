"""Batches of conversations, of which the last answer is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from sft.scripts.chatml_collator import DataCollatorForChatML
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LONG = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And today?"},
    {"role": "assistant", "content": "Paris, too"},
]
SHORT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
ROWS = [{"messages": LONG}, {"messages": SHORT}]


def trained(batch: dict[str, torch.Tensor], ignore_index: int = -100) -> list[str]:
    return [TOKENIZER.decode(row[row != ignore_index]) for row in batch["labels"]]


def test_only_the_last_answer_is_trained_with_its_terminator() -> None:
    assert trained(DataCollatorForChatML(TOKENIZER)(ROWS)) == ["Paris, too<|im_end|>", "Hi<|im_end|>"]


def test_batches_are_padded_on_the_left_and_have_the_prompts_alone() -> None:
    batch = DataCollatorForChatML(TOKENIZER)(ROWS)
    whole, prompt = TOKENIZER.apply_chat_template(SHORT, tokenize=False), "<|im_start|>user\nHello<|im_end|>\n"
    length = len(TOKENIZER(whole)["input_ids"])
    assert batch["attention_mask"][1].sum() == length
    assert set(batch["input_ids"][1, :-length].tolist()) == {TOKENIZER.pad_token_id}
    assert TOKENIZER.decode(batch["input_ids"][1, -length:]) == whole
    kept = batch["prompts"][1][batch["prompt_attention_mask"][1].bool()]
    assert TOKENIZER.decode(kept) == f"{prompt}<|im_start|>assistant\n"
    assert batch["prompts"].shape == batch["prompt_attention_mask"].shape
    assert TOKENIZER.padding_side == "right"  # the tokenizer itself is not changed


def test_own_names_and_labels_can_be_chosen() -> None:
    collator = DataCollatorForChatML(TOKENIZER, ignore_index=-1, messages_key="chat")
    assert trained(collator([{"chat": SHORT}]), -1) == ["Hi<|im_end|>"]


def test_a_given_prompt_has_all_answers_after_it_trained_and_no_question() -> None:
    prompt = TOKENIZER.apply_chat_template(LONG[:1], tokenize=False, add_generation_prompt=True)
    batch = DataCollatorForChatML(TOKENIZER)([{"messages": LONG, "prompt": prompt}])
    assert trained(batch) == ["Paris<|im_end|>Paris, too<|im_end|>"]
    batch = DataCollatorForChatML(TOKENIZER)([{"messages": SHORT, "prompt": "<|im_start|>user\nHello"}])
    assert trained(batch) == ["Hi<|im_end|>"]
    with pytest.raises(ValueError, match="row 0 of the batch: its 'prompt' is not the beginning of its conversation"):
        DataCollatorForChatML(TOKENIZER)([{"messages": LONG, "prompt": "Hello"}])


def test_token_ids_are_used_if_they_begin_with_the_prompt() -> None:
    ids = TOKENIZER(TOKENIZER.apply_chat_template(SHORT, tokenize=False))["input_ids"]
    batch = DataCollatorForChatML(TOKENIZER)([{"messages": SHORT, "input_ids": ids, "attention_mask": [1] * len(ids)}])
    assert batch["input_ids"].tolist() == [ids]
    assert trained(batch) == ["Hi<|im_end|>\n"]
    with pytest.raises(ValueError, match="do not begin with the tokens of its prompt"):
        DataCollatorForChatML(TOKENIZER)([{"messages": SHORT, "input_ids": ids[1:]}])


def test_rows_are_truncated_and_those_without_an_answer_left_are_counted() -> None:
    with pytest.warns(UserWarning, match="1 of 2 rows of this batch have no answer in their first 20 tokens"):
        batch = DataCollatorForChatML(TOKENIZER, max_length=20)(ROWS)
    assert batch["input_ids"].shape[1] == 20
    assert (batch["labels"][0] == -100).all()


def test_conversations_without_a_last_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 of the batch: its last message is by user"):
        DataCollatorForChatML(TOKENIZER)([*ROWS[:1], {"messages": LONG[:3]}])
    with pytest.raises(ValueError, match=r"row 0 of the batch: it has no 'messages', only \['text'\]"):
        DataCollatorForChatML(TOKENIZER)([{"text": "Hello"}])


def test_tokenizers_without_a_padding_token_are_refused() -> None:
    with pytest.raises(ValueError, match="does not have a pad token"):
        DataCollatorForChatML(tiny_tokenizer(pad_token=None))


def test_it_trains_in_the_trainer_as_the_trainer_itself_does(tmp_path: Any) -> None:
    losses = []
    for given in (True, False):
        options: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
        if given:
            options |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        else:
            options["last_turn_only_loss"] = True
        trainer = SFTTrainer(
            tiny_model(),
            args=quiet_config(tmp_path, **options),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=TOKENIZER,
            data_collator=DataCollatorForChatML(TOKENIZER) if given else None,
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
