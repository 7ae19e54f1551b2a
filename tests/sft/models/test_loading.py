"""Loading of models: what works, and what is refused with which message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.family_checks import special_tokens
from benchmarks.tiny_families import Sizes, tiny_config, tiny_family
from sft.attention.kernels import SFT_DOCUMENTS
from sft.export.merge import merge_adapter
from sft.export.proof import logits_of
from sft.models.adapters import wrap_adapter
from sft.models.checkpoint import load_tokenizer
from sft.models.loading import load_converted_weights, load_model, parse_dtype, training_device
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(dtype="bfloat16").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [("float32", torch.float32), ("torch.bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", "auto")],
)
def test_dtype_names_are_understood(name: str | torch.dtype, expected: torch.dtype | str) -> None:
    assert parse_dtype(name) == expected


@pytest.mark.parametrize(("name", "meant"), [("bf16", "bfloat16"), ("flaot32", "float32"), ("fp16", "float16")])
def test_dtype_that_does_not_exist_names_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        parse_dtype(name)


def test_integer_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="not one that models are trained in"):
        parse_dtype(torch.int8)


def test_model_is_loaded_in_the_dtype_asked_for(folder: Path) -> None:
    assert load_model(folder).dtype is torch.float32
    assert load_model(folder, dtype=None, torch_dtype=None).dtype is torch.float32
    assert load_model(folder, dtype="bfloat16").dtype is torch.bfloat16
    assert load_model(folder, torch_dtype="float16").dtype is torch.float16


def test_two_names_of_one_option_must_agree(folder: Path) -> None:
    with pytest.raises(ValueError, match="two names of one option"):
        load_model(folder, dtype="bfloat16", torch_dtype="float16")


def test_further_arguments_reach_from_pretrained(folder: Path) -> None:
    model = load_model(folder, attn_implementation="eager", use_cache=False)
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


@pytest.mark.parametrize("width", [4, 8])
def test_former_arguments_load_in_8bit_and_load_in_4bit_quantize(tmp_path: Path, width: int) -> None:
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = load_model(tmp_path, **{f"load_in_{width}bit": True})
    assert getattr(model, f"is_loaded_in_{width}bit")


def test_two_quantizations_at_once_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="load_in_8bit and load_in_4bit are given together"):
        load_model(folder, load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_8bit and quantization_config are given together"):
        load_model(folder, load_in_8bit=True, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_vision_language_checkpoint_keeps_its_image_tower(tmp_path: Path) -> None:
    config = LlavaConfig(
        text_config=tiny_model().config,
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_index=5,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is LlavaForConditionalGeneration


PARTS = {
    "emu3": "Emu3ForCausalLM",
    "mllama": "MllamaForCausalLM",
    "pp_chart2table": "GotOcr2ForConditionalGeneration",
}
"""Family -> class that the auto classes do not know for its config, or know for another type of config."""


@pytest.mark.parametrize("family", PARTS)
def test_checkpoint_is_loaded_trained_and_merged_as_the_class_that_it_names(family: str, tmp_path: Path) -> None:
    model = tiny_family(family, Sizes(), special_tokens())
    model.save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    assert type(loaded).__name__ == type(model).__name__ == PARTS[family]
    rows = [list(range(5, 25)), list(range(60, 70))]
    torch.testing.assert_close(logits_of(loaded, rows), logits_of(model, rows), rtol=0, atol=0)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = wrap_adapter(loaded, adapter)
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", rows, tolerance=1e-4)
    assert report.max_logit_diff < 1e-4 < report.adapter_effect
    merged = load_model(tmp_path / "merged")
    assert type(merged).__name__ == PARTS[family]
    torch.testing.assert_close(logits_of(merged, rows), logits_of(adapted, rows), rtol=1e-4, atol=1e-4)


def test_classifier_of_images_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = tiny_config("shieldgemma2", Sizes(), special_tokens())
    config.architectures = ["ShieldGemma2ForImageClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds ShieldGemma2ForImageClassification, a model for image classification"):
        load_model(tmp_path)


def test_training_resumes_where_a_config_has_values_that_only_its_class_knows(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [list(range(5, 25)), list(range(60, 70))]})

    def trainer(folder: str) -> SFTTrainer:
        model = tiny_family("deepseek_v4", Sizes(), special_tokens())
        assert model.config.mlp_layer_types == ["hash_moe", "moe", "moe"]
        config = quiet_config(tmp_path / folder, max_steps=2, save_steps=1, padding_free=False)
        return SFTTrainer(model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected = dict(whole.model.named_parameters())
    different = [name for name, weight in resumed.model.named_parameters() if not torch.equal(weight, expected[name])]
    assert different == []


def test_auto_attention_is_the_choice_of_transformers(folder: Path) -> None:
    assert load_model(folder, attn_implementation="auto").config._attn_implementation == "sdpa"


def test_misspelt_attention_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'flash_attention_2'"):
        load_model(folder, attn_implementation="flash_atention_2")
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        load_model(folder, attn_implementation="SDPA")
    with pytest.raises(ValueError, match="did you mean 'eager'"):
        load_model(folder, attn_implementation={"": "sdpa", "text_config": "eagr"})
    assert load_model(folder, attn_implementation={"": "eager"}).config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is that of a machine without a GPU")
@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn"]
)
def test_attention_that_needs_a_gpu_is_refused_on_a_cpu(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"attn_implementation='{name}' cannot be used.*CUDA.*Use 'sdpa'"):
        load_model(folder, dtype="bfloat16", attn_implementation=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is that of a machine without a GPU")
@pytest.mark.parametrize(("precision", "complains"), [(None, True), ("bf16", False)])
def test_flash_attention_wants_half_precision_or_autocast(folder: Path, precision: str | None, complains: bool) -> None:
    with pytest.raises(ValueError, match="CUDA") as caught:
        load_model(folder, attn_implementation="flash_attention_2", mixed_precision=precision)
    assert ("float16 or bfloat16" in str(caught.value)) is complains


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [("cpu", "cpu"), ({"": "cpu"}, "cpu"), ({"": 1}, "cuda:1"), (torch.device("xpu"), "xpu")],
)
def test_device_map_tells_where_the_model_will_be(device_map: object, expected: str) -> None:
    assert str(training_device(device_map)) == expected


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_model(tmp_path)


def test_asking_for_pickled_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="use_safetensors=False asks for pickled weights"):
        load_model(folder, use_safetensors=False)


def test_folder_without_weights_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="can't be loaded as a model"):
        load_model(tmp_path)


def changed_config(folder: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def test_a_size_that_no_tensor_can_have_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No model can be made of the config\.json.*negative dimension"):
        load_model(changed_config(folder, tmp_path, head_dim=-4))


def test_layers_that_the_checkpoint_lacks_are_refused(folder: Path, tmp_path: Path) -> None:
    place = changed_config(folder, tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 weights .*random: model\.layers\.2\..*save_pretrained") as caught:
        load_model(place)
    assert str(place) in str(caught.value)


def test_tied_output_layer_may_be_missing(folder: Path) -> None:
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_of_another_size_are_named_with_both(folder: Path, tmp_path: Path) -> None:
    place = changed_config(folder, tmp_path, intermediate_size=48)
    with pytest.raises(ValueError, match=r"6 weights .*mlp\.down_proj\.weight is \(16, 32\) and should be \(16, 48\)"):
        load_model(place)
    assert load_model(place, ignore_mismatched_sizes=True).config.intermediate_size == 48


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"model\.safetensors \(\d+ bytes\) is damaged or cut off: .*Download"),
        (b"garbage, not weights", r"model\.safetensors \(20 bytes\) is damaged or cut off"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
    ],
)
def test_damaged_weight_file_is_named(folder: Path, tmp_path: Path, content: bytes | None, words: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)


def test_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing' was found neither as a folder nor on the hub"):
        load_model("nobody/nothing", local_files_only=True)


def test_tokenizer_reports_offsets(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer("Hello", return_offsets_mapping=True)["offset_mapping"][-1][1] == 5


def test_tokenizer_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer("nobody/nothing", local_files_only=True)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "tokenizer.json",
            "{garbage",
            r"tokenizer\.json is not valid JSON \(Expecting property name.*Copy the model's",
        ),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer.json", '{"model": 3}', r"The tokenizer of '.*' can't be loaded \(KeyError: 'added_tokens'\)"),
        ("tokenizer.json", None, r"holds no tokenizer \(tokenizer\.json\).*save_pretrained"),
    ],
)
def test_damaged_tokenizer_names_the_file(
    folder: Path, tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(tmp_path)


def test_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its vocabulary is empty"):
        load_tokenizer(tmp_path)


def test_weights_are_read_into_a_model_whose_image_tower_was_made_with_another_attention(tmp_path: Path) -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    saved, model = (tiny_family("deepseek_ocr2", Sizes(), tokens, seed) for seed in (0, 1))
    saved.save_pretrained(tmp_path)
    model.set_attn_implementation(SFT_DOCUMENTS)
    load_converted_weights(model, tmp_path)
    assert model.config._attn_implementation == SFT_DOCUMENTS
    assert all(torch.equal(weight, saved.get_parameter(name)) for name, weight in model.named_parameters())
