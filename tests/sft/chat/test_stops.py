"""What ends a trained turn ends generation: the generation config is mended, or a warning says that nothing ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import GenerationConfig

from sft.train.trainer import SFTTrainer
from tests.tiny import CHATML, quiet_config, tiny_model, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
CHATS = Dataset.from_dict({"messages": [MESSAGES] * 3})
WITHOUT_END = CHATML.replace("<|im_end|>\n", "\n")
END_NOT_MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% generation %}{{ message['content'] }}"
    "{% endgeneration %}<|im_end|>\n{% endfor %}"
)
ENDOFTEXT, IM_END = 0, 2


def base_model() -> Any:
    """Return a model whose generation stops at `<|endoftext|>`."""
    model = tiny_model(eos_token_id=ENDOFTEXT)
    assert model.generation_config.eos_token_id == ENDOFTEXT
    return model


def base_tokenizer(template: str = CHATML, **overrides: Any) -> Any:
    return tiny_tokenizer(template, **{"eos_token": "<|endoftext|>", **overrides})


def trainer_on(
    rows: Any, folder: Path, tokenizer: Any, model: Any = None, peft_config: Any = None, **options: Any
) -> Any:
    return SFTTrainer(
        model or base_model(),
        args=quiet_config(folder, max_steps=1, max_length=64, **options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sft.chat.stops"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": True}])
def test_closing_token_of_the_template_is_added_to_the_generation_config_and_saved(
    streamed: bool, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = base_tokenizer()
    trainer = trainer_on(CHATS.to_iterable_dataset() if streamed else CHATS, tmp_path, tokenizer, **options)
    assert trainer.model.generation_config.eos_token_id == [IM_END, ENDOFTEXT]
    assert said(caplog) == [
        "trained turns end in '<|im_end|>', at which generation did not stop (it stopped at '<|endoftext|>'): added it "
        "to the model's generation_config.eos_token_id. The tokenizer's eos_token is still '<|endoftext|>'; "
        "SFTConfig(eos_token='<|im_end|>') changes it, too"
    ]
    assert tokenizer.eos_token == "<|endoftext|>"
    if not streamed and not options:
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        assert set(GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id) == {IM_END, ENDOFTEXT}


def test_adapter_is_saved_without_generation_config_and_the_message_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_on(CHATS, tmp_path, base_tokenizer(), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert "An adapter is saved without generation config: set SFTConfig(eos_token='<|im_end|>')" in said(caplog)[0]


@pytest.mark.parametrize("options", [{"eos_token": "<|im_end|>"}, {"chat_template_path": "chatml"}])
def test_option_that_makes_the_closing_token_eos_leaves_nothing_to_say(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = base_tokenizer()
    trainer_on(CHATS, tmp_path, tokenizer, **options)
    assert (said(caplog), tokenizer.eos_token) == ([], "<|im_end|>")


def test_stop_token_of_the_generation_config_alone_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = base_model()
    model.generation_config.eos_token_id = [ENDOFTEXT, IM_END]
    trainer_on(CHATS, tmp_path, base_tokenizer(), model)
    assert (said(caplog), model.generation_config.eos_token_id) == ([], [ENDOFTEXT, IM_END])


@pytest.mark.parametrize(
    ("template", "options"),
    [(WITHOUT_END, {}), (WITHOUT_END, {"assistant_only_loss": True}), (END_NOT_MARKED, {"assistant_only_loss": True})],
)
def test_turns_without_an_end_are_said_to_teach_no_stop(
    template: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = base_model()
    trainer_on(CHATS, tmp_path, base_tokenizer(template), model, **options)
    assert said(caplog)[0].startswith(
        "3 of 3 trained turns do not end in a token that stops generation ('<|endoftext|>'), so the model would never "
        "learn to stop"
    )
    assert model.generation_config.eos_token_id == ENDOFTEXT


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ({"text": ["Hello"]}, {}),
        ({"text": ["Hello"]}, {"dataset_kwargs": {"append_concat_token": False}}),
        ({"prompt": ["Hello"], "completion": [" you"]}, {}),
        ({"input_ids": [[5, 6], [7, ENDOFTEXT]]}, {}),
    ],
)
def test_rows_that_end_in_eos_or_are_meant_to_have_none_pass(
    rows: Any, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_on(Dataset.from_dict(rows), tmp_path, base_tokenizer(), **options)
    assert said(caplog) == []


def test_token_rows_that_never_train_a_stop_token_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, ENDOFTEXT]], "labels": [[5, 6, -100]]})
    trainer_on(rows, tmp_path, base_tokenizer())
    assert said(caplog) == [
        "none of the first 1 rows trains a token that stops generation ('<|endoftext|>'), so the model would never "
        "learn to stop: end input_ids with '<|endoftext|>', or, if rows end in another token, name it: "
        "SFTConfig(eos_token=...)"
    ]
