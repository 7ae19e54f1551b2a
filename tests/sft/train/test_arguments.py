"""Arguments of the trainer: configuration, model, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from sft.config import SFTConfig
from sft.models.loading import load_model
from sft.train.arguments import (
    align_special_tokens,
    apply_chat_template,
    choose_router_loss,
    resolve_config,
    resolve_model,
    resolve_processor,
)
from tests.sft.chat.reasoning_templates import QWEN35
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


def test_code_of_the_model_is_trusted_by_either_name(folder: str) -> None:
    assert resolve_config(config(trust_remote_code=True), folder).model_init_kwargs == {"trust_remote_code": True}
    assert resolve_config(config(), folder).model_init_kwargs is None
    assert resolve_config(config(trust_remote_code=True), tiny_model()).model_init_kwargs is None
    with pytest.raises(ValueError, match=r"trust_remote_code=True and model_init_kwargs=.* contradict each other"):
        resolve_config(config(trust_remote_code=True, model_init_kwargs={"trust_remote_code": False}), folder)


def test_custom_code_runs_only_if_it_is_trusted(folder: str, tmp_path: Path) -> None:
    custom = tmp_path / "custom"
    shutil.copytree(folder, custom)
    (custom / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (custom / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    described = json.loads((custom / "config.json").read_text())
    described |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (custom / "config.json").write_text(json.dumps(described))
    trusted = resolve_config(config(trust_remote_code=True), str(custom))
    assert type(resolve_model(str(custom), trusted)).__name__ == "OwnForCausalLM"
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        resolve_model(str(custom), resolve_config(config(), str(custom)))


@pytest.mark.parametrize(
    ("ends", "expected"), [([2, 0], [1, 2, 0]), (2, [1, 2]), (None, [1]), ([2, 1], [2, 1]), (1, [1])]
)
def test_end_that_an_option_names_ends_generation_beside_the_models_own(ends: Any, expected: list[int]) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = ends
    asked = config(eos_token="<|im_start|>", pad_token="<|endoftext|>")
    align_special_tokens(model, resolve_processor(tokenizer, model, asked), asked)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (1, expected)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (0, 0)


def test_weight_of_the_routers_loss_is_the_options_or_the_models() -> None:
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    for stated, asked, expected in (
        (False, None, (0.001, False)),
        (True, None, (0.001, True)),
        (False, 0.5, (0.5, True)),
        (True, 0.0, (0.0, False)),
    ):
        model = tiny_model("qwen3_moe", output_router_logits=stated, num_key_value_heads=1, **routed)
        assert choose_router_loss(model, config(router_aux_loss_coef=asked)) == expected
        assert model.config.output_router_logits is expected[1]
    assert choose_router_loss(tiny_model(), config()) == (0.0, False)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a Mixture-of-Experts model"):
        choose_router_loss(tiny_model(), config(router_aux_loss_coef=0.1))
    with pytest.raises(ValueError, match="router_aux_loss_coef=-1 must be at least 0"):
        choose_router_loss(model, config(router_aux_loss_coef=-1))


def test_thinking_sets_the_variable_that_it_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reasoned = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}] * 2
    for thinking, variable in (("keep", "preserve_thinking = true"), ("drop", "enable_thinking = false")):
        tokenizer = tiny_tokenizer(QWEN35.template)
        config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], thinking=thinking)
        apply_chat_template(None, tokenizer, config, [reasoned])
        assert variable in str(tokenizer.chat_template)
        assert f"thinking='{thinking}': the chat template gets" in caplog.text
    tokenizer = tiny_tokenizer(QWEN35.template)
    apply_chat_template(
        None, tokenizer, SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]), [reasoned[:2]]
    )
    assert tokenizer.chat_template == QWEN35.template
