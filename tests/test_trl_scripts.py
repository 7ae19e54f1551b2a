"""Training scripts in the form of those that the SFT documents link, run from command lines on tiny stand-ins.

Each function makes the calls of one generation of scripts, with other words: options from `TrlParser`, a data set and a
model that are local folders here, a trainer, and an upload to a hub that is a stub. The import line is that of `sft`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, List, load_dataset
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from sft import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
    setup_chat_format,
)
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_vision import square, tiny_processor, tiny_vision_model

QUICK = [
    *("--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
    *("--logging_steps", "1", "--per_device_train_batch_size", "2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `chat` (with a template), `base` (without), `llava`, and data sets `chats` and `pictures`."""
    root = tmp_path_factory.mktemp("scripts")
    for name, template in (("chat", True), ("base", False)):
        tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
        tokenizer.save_pretrained(root / name)
        tiny_model("qwen2").save_pretrained(root / name)
    processor = tiny_processor("llava")
    processor.save_pretrained(root / "llava")
    tiny_vision_model("llava", processor).save_pretrained(root / "llava")
    for name in ("chats", "pictures"):
        (root / name).mkdir()
    for split, size in (("train", 8), ("test", 4)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {number} and {number}?"},
                    {"role": "assistant", "content": str(2 * number)},
                ]
            }
            for number in range(size)
        ]
        (root / "chats" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pictures = [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": colour}]},
                ],
                "images": [square(colour)],
            }
            for colour in ("red", "green", "blue", "white")
        ]
        Dataset.from_list(pictures).cast_column("images", List(Image())).to_parquet(
            root / "pictures" / f"{split}.parquet"
        )
    return root


@pytest.fixture(autouse=True)
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the folders are, with a cache and a hub of the test's own."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    class Hub:
        def create_repo(self, name: str, **given: Any) -> Any:
            return SimpleNamespace(repo_id=f"owner/{name}")

        def upload_folder(self, **given: Any) -> Any:
            (Path(given["folder_path"]) / "uploaded").write_text(given["repo_id"])
            return SimpleNamespace(done=lambda: True, result=lambda: None)  # a future of the background upload

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)


def script_of_0_15(args: list[str]) -> SFTTrainer:
    """The model is given by name, and its arguments as `model_init_kwargs`."""
    script_args, training_args, model_args = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(
        args
    )
    quantization_config = get_quantization_config(model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "torch_dtype": model_args.torch_dtype,
        "use_cache": not training_args.gradient_checkpointing,
        "device_map": get_kbit_device_map() if quantization_config is not None else None,
        "quantization_config": quantization_config,
    }
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, use_fast=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return finish(script_args, training_args, model_args, model=model_args.model_name_or_path, tokenizer=tokenizer)


def script_of_0_17(args: list[str]) -> SFTTrainer:
    """The script loads the model, and sets up a chat format where the tokenizer has none."""
    script_args, training_args, model_args = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(
        args
    )
    quantization_config = get_quantization_config(model_args)
    assert AutoConfig.from_pretrained(model_args.model_name_or_path).model_type == "qwen2"
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        torch_dtype=model_args.torch_dtype,
        use_cache=not training_args.gradient_checkpointing,
        device_map=get_kbit_device_map() if quantization_config is not None else None,
        quantization_config=quantization_config,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if tokenizer.chat_template is None:
        model, tokenizer = setup_chat_format(model, tokenizer, format="chatml")
    return finish(script_args, training_args, model_args, model=model, tokenizer=tokenizer)


def finish(script_args: Any, training_args: Any, model_args: Any, *, model: Any, tokenizer: Any) -> SFTTrainer:
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return trainer


def script_of_1_16(args: list[str]) -> SFTTrainer:
    """Mixtures of data sets, streams, and arguments of the trainer for what older scripts gave to the model."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), prog="sft")
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(
        args, fail_with_unknown_args=False
    )
    given = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    if dataset_args.datasets:
        dataset: Any = get_dataset(dataset_args)
    else:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
    return trainer


def script_with_images(args: list[str], *, with_processor: bool) -> SFTTrainer:
    """The script collates pictures itself; older ones give the trainer the tokenizer alone."""
    script_args, training_args, model_args = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(
        args
    )
    training_args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    training_args.remove_unused_columns = False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    dtype = model_args.torch_dtype
    processor = AutoProcessor.from_pretrained(
        model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        torch_dtype=dtype if dtype in ("auto", None) else getattr(torch, dtype),
    )

    def collate(examples: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [example["images"] for example in examples]
        if isinstance(model, LlavaForConditionalGeneration):
            images = [image[0] for image in images]
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        for ignored in (processor.tokenizer.pad_token_id, processor.image_token_id):
            labels[labels == ignored] = -100
        batch["labels"] = labels
        return batch

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        data_collator=collate,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        processing_class=processor if with_processor else processor.tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    return trainer


DOCUMENTED = ["--learning_rate", "2.0e-5", "--num_train_epochs", "1", "--packing", "--gradient_accumulation_steps", "8"]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "100", "--push_to_hub"]


@pytest.mark.parametrize("script", [script_of_0_15, script_of_0_17, script_of_1_16])
def test_full_training_as_the_scripts_document_it(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "Qwen2-0.5B-SFT"
    names = ["--model_name_or_path", "chat", "--dataset_name", "chats", "--output_dir", str(out)]
    trainer = script([*names, *DOCUMENTED, *EVALUATED, *QUICK, "--gradient_checkpointing", "--eos_token", "<|im_end|>"])
    assert trainer.args.activation_checkpointing
    assert sum(len(row["seq_lengths"]) for row in trainer.train_dataset) == 8
    assert trainer.state.global_step == 1
    before, after = load_file("chat/model.safetensors"), load_file(out / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (out / "uploaded").read_text() == "owner/Qwen2-0.5B-SFT"
    assert "# Qwen2-0.5B-SFT" in (out / "README.md").read_text()


@pytest.mark.parametrize("script", [script_of_0_15, script_of_0_17, script_of_1_16])
def test_lora_as_the_scripts_document_it(script: Any, tmp_path: Path) -> None:
    names = ["--model_name_or_path", "chat", "--dataset_name", "chats", "--output_dir", str(tmp_path / "out")]
    lora = ["--use_peft", "--lora_r", "32", "--lora_alpha", "16", "--learning_rate", "2.0e-4"]
    trainer = script([*names, *DOCUMENTED[2:], *QUICK, *lora, "--gradient_checkpointing"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 16)
    assert trainer.state.log_history[0]["learning_rate"] == 2e-4


def test_base_without_a_chat_template_gets_one(tmp_path: Path) -> None:
    args = ["--model_name_or_path", "base", "--dataset_name", "chats", "--output_dir", str(tmp_path), *DOCUMENTED]
    trainer = script_of_0_17([*args, *QUICK])
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == trainer.processing_class.chat_template
    assert trainer.model.generation_config.eos_token_id == trainer.processing_class.eos_token_id


def test_streamed_data_set(tmp_path: Path) -> None:
    args = ["--model_name_or_path", "chat", "--dataset_name", "chats", "--output_dir", str(tmp_path)]
    trainer = script_of_1_16([*args, "--max_steps", "2", "--dataset_streaming", *QUICK])
    assert trainer.state.global_step == 2


def test_mixture_and_options_from_one_file(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
model_name_or_path: chat
datasets:
  - path: chats
    split: train
  - path: {folder / "chats" / "test.jsonl"}
test_split_size: 2
eval_strategy: steps
eval_steps: 1
output_dir: {tmp_path / "out"}
max_steps: 1
assistant_only_loss: yes
save_strategy: no
"""
    )
    trainer = script_of_1_16(["--config", str(file), *QUICK])
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (10, 2)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    labels = [token for token in trainer.train_dataset[0]["labels"] if token >= 0]
    assert trainer.processing_class.decode(labels).endswith("<|im_end|>")
    assert "What is" not in trainer.processing_class.decode(labels)


def test_trust_in_remote_code_reaches_both_objects_that_scripts_ask() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    parsed = parser.parse_args_and_config(["--output_dir", "out", "--use_cpu", "--trust_remote_code"])
    assert (parsed[1].trust_remote_code, parsed[2].trust_remote_code) == (True, True)
    parsed = parser.parse_args_and_config(["--output_dir", "out", "--use_cpu"])
    assert (parsed[1].trust_remote_code, parsed[2].trust_remote_code) == (False, False)


@pytest.mark.parametrize("with_processor", [False, True])
def test_pictures_as_the_scripts_document_them(tmp_path: Path, with_processor: bool) -> None:
    args = ["--model_name_or_path", "llava", "--dataset_name", "pictures", "--output_dir", str(tmp_path)]
    options = "--bf16 --torch_dtype bfloat16 --gradient_checkpointing --gradient_accumulation_steps 2 --max_steps 1"
    trainer = script_with_images([*args, *options.split(), *QUICK], with_processor=with_processor)
    assert trainer.model.dtype is torch.bfloat16
    assert (tmp_path / "processor_config.json").is_file() is with_processor
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_pictures_with_lora(tmp_path: Path) -> None:
    args = ["--model_name_or_path", "llava", "--dataset_name", "pictures", "--output_dir", str(tmp_path)]
    options = "--use_peft --lora_target_modules q_proj v_proj --max_steps 1 --eval_strategy steps --eval_steps 1"
    script_with_images([*args, *options.split(), *QUICK], with_processor=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()
