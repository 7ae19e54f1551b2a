"""Arguments that older scripts give to the trainer work, or are refused with what replaced them."""

from __future__ import annotations

from typing import Any

import pytest

from sft.config import SFTConfig
from sft.train.arguments import choose_processing_class, take_over_arguments
from tests.tiny import tiny_tokenizer


def taken(former: dict[str, Any], model: Any = "name", **options: Any) -> SFTConfig:
    config = SFTConfig(output_dir="out", use_cpu=True, **options)
    take_over_arguments(config, former, model)
    return config


def test_options_reach_the_configuration() -> None:
    config = taken({"max_seq_length": 64, "packing": True, "dataset_text_field": "body", "num_of_sequences": 3})
    assert (config.max_length, config.packing, config.dataset_text_field) == (64, True, "body")
    assert config.constant_length == {"num_of_sequences": 3}


def test_loading_arguments_join_model_init_kwargs() -> None:
    config = taken({"torch_dtype": "bfloat16"}, model_init_kwargs={"use_cache": False})
    assert config.model_init_kwargs == {"use_cache": False, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("former", "model", "options", "complaint"),
    [
        ({"load_in_8bit": True}, object(), {}, "load_in_8bit=True would be ignored: the model is an object already"),
        ({"packing": False}, "name", {"packing": True}, "packing=False contradicts args, where it is True"),
        ({"max_seq_length": 8}, "name", {"max_length": 9}, "two names of one option"),
        (
            {"dtype": "float16"},
            "name",
            {"model_init_kwargs": {"dtype": "float32"}},
            "dtype is also given in model_init_kwargs",
        ),
        ({"infinite": True}, "name", {}, r"ConstantLengthDataset\(\.\.\., infinite=True\)"),
        ({"num_train_epochs": 2}, "name", {}, r"give args=SFTConfig\(num_train_epochs=2\)"),
        ({"pakcing": True}, "name", {}, "did you mean 'packing'"),
        ({"dataset_kwargs": {"skip": True}}, "name", {}, "dataset_kwargs has unknown keys"),
    ],
)
def test_arguments_without_an_option_are_refused_with_a_way_out(
    former: dict[str, Any], model: Any, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        taken(former, model, **options)


def test_tokenizer_and_processing_class_are_two_names_of_one_argument() -> None:
    tokenizer = tiny_tokenizer()
    assert choose_processing_class(None, tokenizer) is choose_processing_class(tokenizer, None) is tokenizer
    assert choose_processing_class(tokenizer, tokenizer) is tokenizer
    with pytest.raises(ValueError, match="two names of one argument"):
        choose_processing_class(tokenizer, tiny_tokenizer())


def test_former_names_of_options() -> None:
    assert SFTConfig(output_dir="out", max_seq_length=99).max_length == 99
    assert SFTConfig(output_dir="out", use_liger=True).use_liger_kernel is True
