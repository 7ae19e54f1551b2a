"""Answers to evaluation prompts while a model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import GenerationConfig

from sft.scripts import completions
from sft.scripts.completions import LogCompletionsCallback
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

PAIRS = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": f"What is {number}?"}] for number in range(3)],
        "completion": [[{"role": "assistant", "content": str(number)}] for number in range(3)],
    }
)
PROMPTS = [f"<|im_start|>user\nWhat is {number}?<|im_end|>\n<|im_start|>assistant\n" for number in range(3)]


def trainer(folder: Path, rows: Any = PAIRS, **options: Any) -> SFTTrainer:
    given = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 2, **options}
    return SFTTrainer(
        tiny_model(),
        args=quiet_config(folder, **given),
        train_dataset=PAIRS,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )


def read(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("config", [None, GenerationConfig(max_new_tokens=4, do_sample=True, pad_token_id=3)])
def test_answers_are_logged_every_freq_steps(
    tmp_path: Path, config: GenerationConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "DEFAULT_NEW_TOKENS", 4)
    training = trainer(tmp_path)
    callback = LogCompletionsCallback(training, generation_config=config, num_prompts=2, freq=2)
    training.add_callback(callback)
    training.train()
    rows = read(tmp_path)
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in ("2", "4") for prompt in PROMPTS[:2]
    ]
    assert [tuple(row.values()) for row in rows] == callback.table
    assert training.processing_class.padding_side == "right"
    assert training.model.training


def test_greedy_answers_equal_those_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "DEFAULT_NEW_TOKENS", 6)
    training = trainer(tmp_path)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=3, eos_token_id=2)
    greedy, generated = LogCompletionsCallback(training, freq=1), LogCompletionsCallback(training, config, freq=1)
    assert greedy._answers(greedy.prompts, 2) == generated._answers(generated.prompts, 2)


def test_steps_are_those_of_the_evaluation_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "DEFAULT_NEW_TOKENS", 2)
    training = trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    training.add_callback(LogCompletionsCallback(training, num_prompts=1))
    training.train()
    assert [row["step"] for row in read(tmp_path)] == ["3"]


def test_prompts_are_the_column_of_rows_that_are_not_prepared() -> None:
    tokenizer = tiny_tokenizer()
    text = Dataset.from_dict({"prompt": ["The capital", "of France"]})
    assert [tokenizer.decode(ids) for ids in completions._prompts(PAIRS, tokenizer, None)] == PROMPTS
    assert [tokenizer.decode(ids) for ids in completions._prompts(text, tokenizer, 1)] == ["The capital"]


def test_prompts_of_prepared_rows_are_what_precedes_the_last_trained_tokens(tmp_path: Path) -> None:
    chats = Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": "Two?"},
                    {"role": "assistant", "content": "2"},
                ]
            ]
            * 2
        }
    )
    whole = (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    for packing in (False, True):
        training = SFTTrainer(
            tiny_model(),
            args=quiet_config(tmp_path, assistant_only_loss=True, packing=packing, max_length=256),
            train_dataset=chats,
            eval_dataset=chats,
            processing_class=tiny_tokenizer(),
        )
        prompts = LogCompletionsCallback(training, freq=1).prompts
        assert [training.processing_class.decode(prompt) for prompt in prompts] == [whole, whole]


def test_what_can_not_be_answered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the trainer an eval_dataset"):
        LogCompletionsCallback(trainer(tmp_path, rows=None), freq=1)
    with pytest.raises(ValueError, match="give freq, or eval_steps"):
        LogCompletionsCallback(trainer(tmp_path))
    text = Dataset.from_dict({"text": ["Paris is the capital of France."]})
    with pytest.raises(ValueError, match=r"columns \['input_ids', 'labels'\] and no prompts"):
        LogCompletionsCallback(trainer(tmp_path, rows=text), freq=1)
    with pytest.raises(ValueError, match="the evaluation rows are a IterableDataset"):
        LogCompletionsCallback(trainer(tmp_path, rows=PAIRS.to_iterable_dataset()), freq=1)
