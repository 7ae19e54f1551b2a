"""Options: their descriptions, from a command line, under former names, and set by hand after construction."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from sft.config import ModelConfig, SFTConfig
from sft.models.adapters import get_peft_config


def parsed(*arguments: str) -> tuple[SFTConfig, ModelConfig]:
    parser: Any = HfArgumentParser((SFTConfig, ModelConfig))
    return parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *arguments])


def test_command_line_without_options_gives_the_defaults() -> None:
    config, model = parsed()
    default = SFTConfig(output_dir="out", use_cpu=True)
    same = {name: value for name, value in default.to_dict().items() if name != "logging_dir"}
    assert {name: value for name, value in config.to_dict().items() if name in same} == same
    assert model == ModelConfig()


def test_command_line_of_the_reference_document() -> None:
    config, model = parsed(
        *("--model_name_or_path", "Qwen/Qwen2-0.5B", "--learning_rate", "2.0e-4", "--num_train_epochs", "1"),
        *("--packing", "--eos_token", "<|im_end|>", "--eval_strategy", "steps", "--eval_steps", "100"),
        *("--gradient_checkpointing", "--use_peft", "--lora_r", "32", "--lora_alpha", "16"),
        *("--lora_target_modules", "all-linear", "--torch_dtype", "bfloat16", "--load_in_4bit"),
    )
    assert (config.packing, config.eos_token, config.activation_checkpointing) == (True, "<|im_end|>", True)
    assert config.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (model.lora_r, model.lora_target_modules, model.load_in_4bit) == (32, "all-linear", True)
    assert model.dtype == "bfloat16"


def test_every_option_is_described_and_the_command_line_prints_the_descriptions() -> None:
    own = [option for option in fields(SFTConfig) if option.name in SFTConfig.__annotations__]
    parser: Any = HfArgumentParser((SFTConfig, ModelConfig))
    printed = " ".join(parser.format_help().split())
    for option in [*own, *fields(ModelConfig)]:
        description = option.metadata["help"]
        assert len(description.split()) >= 4, option.name
        assert description.endswith("."), option.name
        assert f"--{option.name}" in printed
        # argparse formats percent signs and breaks lines at hyphens, too
        assert (description % {}).replace(" ", "") in printed.replace(" ", ""), option.name


@pytest.mark.parametrize("names", [["q_proj"], ["q_proj", "v_proj"]])
def test_names_of_layers_on_a_command_line(names: list[str]) -> None:
    adapter = get_peft_config(parsed("--use_peft", "--lora_target_modules", *names)[1])
    assert adapter is not None
    assert adapter.target_modules == set(names)


def test_dicts_are_json_on_a_command_line() -> None:
    config, _ = parsed(
        *("--model_init_kwargs", '{"dtype": "bfloat16"}', "--dataset_kwargs", '{"append_concat_token": false}'),
        *("--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
        *("--include_num_input_tokens_seen", "all"),
    )
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert config.dataset_option("append_concat_token") is False
    assert config.activation_checkpointing_kwargs == {"use_reentrant": True}
    assert config.include_num_input_tokens_seen == "all"
    with pytest.raises(ValueError, match="dataset_kwargs='skip' is not a JSON object"):
        parsed("--dataset_kwargs", "skip")


def test_checkpointing_set_by_hand_under_either_name_takes_effect() -> None:
    config = SFTConfig(output_dir="out", use_cpu=True)
    config.gradient_checkpointing = True
    config.validate()
    assert (config.activation_checkpointing, config.activation_checkpointing_kwargs) == (True, {"use_reentrant": False})
    config.gradient_checkpointing_kwargs = {"use_reentrant": True}
    config.validate()
    assert config.activation_checkpointing_kwargs == {"use_reentrant": True}
    config.activation_checkpointing = False
    config.validate()
    assert (config.activation_checkpointing, config.gradient_checkpointing) == (False, False)


@pytest.mark.parametrize(("ratio", "steps"), [(0, 0), (0.0, 0), (0.051, 6), (1, 100), (1.0, 100)])
def test_warmup_ratio_is_a_share_of_all_steps(ratio: float, steps: int) -> None:
    config = SFTConfig(output_dir="out", use_cpu=True, warmup_ratio=ratio)
    assert config.get_warmup_steps(100) == steps
    again = SFTConfig(**{field.name: getattr(config, field.name) for field in fields(config) if field.init})
    assert again.get_warmup_steps(100) == steps


@pytest.mark.parametrize("ratio", [-0.1, 1.5, 20])
def test_warmup_ratio_that_is_not_a_share_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"warmup_ratio={ratio} is a share of all steps, .* as warmup_steps"):
        SFTConfig(output_dir="out", use_cpu=True, warmup_ratio=ratio)


def test_former_names_of_upstream_options() -> None:
    config = SFTConfig(output_dir="out", use_cpu=True, warmup_ratio=0.25, group_by_length=True)
    assert config.get_warmup_steps(100) == 25
    assert config.train_sampling_strategy == "group_by_length"
    with pytest.raises(ValueError, match=r"warmup_ratio=0.1 and warmup_steps=5 are two names"):
        SFTConfig(output_dir="out", use_cpu=True, warmup_ratio=0.1, warmup_steps=5)


def test_max_length_given_by_name_is_told_from_the_default() -> None:
    for given, is_given, value in (
        ({}, False, 1024),
        ({"max_length": 1024}, True, 1024),
        ({"max_length": None}, True, None),
    ):
        config = SFTConfig(output_dir="out", use_cpu=True, **given)
        assert (config.max_length, config.is_max_length_given) == (value, is_given)
        assert copy.deepcopy(config).is_max_length_given is is_given
    assert SFTConfig(output_dir="out", use_cpu=True).to_dict()["max_length"] == 1024
    assert SFTConfig(output_dir="out", use_cpu=True, max_seq_length=64).max_length == 64
    with pytest.raises(ValueError, match="max_length=None and max_seq_length=64 are two names"):
        SFTConfig(output_dir="out", use_cpu=True, max_seq_length=64, max_length=None)
    config = SFTConfig(output_dir="out", use_cpu=True)
    config.max_length = None
    config.validate()
    assert (config.max_length, config.is_max_length_given) == (None, True)


def test_former_values_of_options() -> None:
    config = SFTConfig(output_dir="out", use_cpu=True, loss_type="chunked_nll", packing_strategy="bfd-requeue")
    assert (config.loss_type, config.packing_strategy) == ("nll", "bfd_split")


@pytest.mark.parametrize(("given", "multiple"), [("auto", None), ("none", None), ("8", 8), (8, 8), (None, None)])
def test_padding_to_a_multiple_is_a_number_or_auto(given: Any, multiple: int | None) -> None:
    config = SFTConfig(output_dir="out", use_cpu=True, pad_to_multiple_of=given)
    assert config.pad_to_multiple_of == config.padding_multiple == multiple


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pad_to_multiple_of": "eight"}, "pad_to_multiple_of='eight' is not a number"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0: give a number of at least 1"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle': use one of keep_start, keep_end"),
        (
            {"truncation_mode": "keep_end", "packing": True, "packing_strategy": "wrapped"},
            "truncation_mode='keep_end' would be ignored: packing with packing_strategy='wrapped'",
        ),
    ],
)
def test_values_that_could_have_no_effect_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SFTConfig(output_dir="out", use_cpu=True, **options)


def test_layout_of_rows_stays_as_given_where_another_library_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TrainingArguments.__post_init__

    def patched(self: Any) -> None:
        self.packing = self.eval_packing = self.padding_free = False  # as unsloth's CPU backend does
        own(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", patched)
    config = SFTConfig(output_dir="out", use_cpu=True, packing=True)
    assert (config.packing, config.eval_packing, config.padding_free) == (True, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "cut"}, "overflow='cut': use one of truncate, split, split_with_prompt, drop, error"),
        ({"overflow": "drop", "max_length": None}, "limits no sequence"),
        ({"overflow": "drop", "packing": True, "packing_strategy": "wrapped"}, "divides long documents itself"),
        ({"overflow": "split", "truncation_mode": "keep_end"}, "which truncates nothing"),
    ],
)
def test_an_overflow_that_would_have_no_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTConfig(output_dir="unused", **options)
