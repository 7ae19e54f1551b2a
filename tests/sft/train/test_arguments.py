"""Arguments of the trainer: configuration, model, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from sft.config import SFTConfig
from sft.models.loading import load_model
from sft.train.arguments import apply_chat_template, resolve_config, resolve_model, resolve_processor
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def config(**options: Any) -> SFTConfig:
    return SFTConfig(output_dir="out", use_cpu=True, **options)


def test_output_folder_is_named_after_the_model() -> None:
    assert resolve_config(None, "some/where/Qwen3-0.6B").output_dir == "Qwen3-0.6B-SFT"
    assert resolve_config(None, tiny_model()).output_dir == "model-SFT"


def test_plain_training_arguments_are_taken_over() -> None:
    taken = resolve_config(TrainingArguments(output_dir="out", learning_rate=3e-4, use_cpu=True), "name")
    assert isinstance(taken, SFTConfig)
    assert (taken.learning_rate, taken.packing) == (3e-4, False)


def test_loading_arguments_with_a_model_object_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model_init_kwargs=.* would be ignored: the model is an object already"):
        resolve_config(config(model_init_kwargs={"dtype": "bfloat16"}), tiny_model())


def test_several_gpus_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match=r"4 GPUs are visible .* DataParallel; .*accelerate launch --num_processes 4"):
        resolve_config(config(), "name")


def test_options_set_by_hand_after_construction_are_checked_too() -> None:
    args = config()
    args.dataset_kwargs = {"skip_preparation": True}
    with pytest.raises(ValueError, match="dataset_kwargs has unknown keys"):
        resolve_config(args, "name")
    args = config()
    args.max_seq_length = 77
    assert resolve_config(args, "name").max_length == 77


def test_model_is_loaded_with_its_arguments_and_an_object_passes(folder: str) -> None:
    loaded = resolve_model(folder, config(model_init_kwargs={"torch_dtype": "bfloat16"}))
    assert loaded.dtype is torch.bfloat16
    assert resolve_model(loaded, config()) is loaded


def test_loading_arguments_may_be_json_text(folder: str) -> None:
    assert resolve_model(folder, config(model_init_kwargs='{"dtype": "bfloat16"}')).dtype is torch.bfloat16


def test_tokenizer_belongs_to_the_model_unless_given(folder: str) -> None:
    own = tiny_tokenizer()
    assert resolve_processor(own, folder, config()) is own
    assert resolve_processor(None, folder, config()).chat_template == own.chat_template
    assert resolve_processor(None, load_model(folder), config()).get_vocab() == own.get_vocab()


def test_model_without_a_name_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="processing_class is needed"):
        resolve_processor(None, tiny_model(), config())


def test_tokens_that_options_name_are_set() -> None:
    tokenizer = resolve_processor(tiny_tokenizer(), "name", config(eos_token="<|endoftext|>", pad_token="<|im_start|>"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_start|>")
    with pytest.raises(ValueError, match=r"pad_token='<none>' is not in the tokenizer's vocabulary"):
        resolve_processor(tiny_tokenizer(), "name", config(pad_token="<none>"))


def test_missing_pad_token_becomes_one_to_spare_not_the_end() -> None:
    tokenizer = resolve_processor(tiny_tokenizer(pad_token=None), "name", config())
    assert tokenizer.pad_token in ("<pad>", "<|endoftext|>")
    assert tokenizer.pad_token != tokenizer.eos_token


def test_template_path_is_a_format_a_file_or_a_tokenizer(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    for path, begins in (("zephyr", "<|user|>"), (str(file), "Hello"), (folder, "<|im_start|>")):
        tokenizer, model = tiny_tokenizer(None), tiny_model()
        assert apply_chat_template(model, tokenizer, config(chat_template_path=path)) is model
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        assert text.startswith(begins)
    with pytest.raises(ValueError, match=r"nowhere\.jinja"):
        apply_chat_template(tiny_model(), tiny_tokenizer(), config(chat_template_path="nowhere.jinja"))
