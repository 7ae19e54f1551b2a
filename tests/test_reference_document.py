"""What the SFT page of 2024-12 to mid-2025 shows, run from `import sft` on tiny models in local folders.

Each test makes the calls of one section of that page as a script would: the import line is another one, and names on
the hub are folders here. It asserts what the section promises, not only that it runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from sft import (
    ConstantLengthDataset,
    DataCollatorForCompletionOnlyLM,
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    clone_chat_template,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
    setup_chat_format,
)
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Paris is the capital of France."] * 3
QUESTIONS = [f"What is {number} and {number}?" for number in range(6)]
ANSWERS = [str(2 * number) for number in range(6)]
CHATS = [
    [
        {"role": "system", "content": "You are helpful"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stands for facebook/opt-350m: a base without chat template, whose tokenizer puts bos before every text."""
    folder = tmp_path_factory.mktemp("opt")
    tokenizer = tiny_tokenizer(None, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    tokenizer.save_pretrained(folder)
    tiny_model("opt").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stands for Qwen/Qwen2.5-0.5B: tied embeddings, ChatML in the tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny_tokenizer().save_pretrained(folder)
    tiny_model("qwen2", tie_word_embeddings=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that are given no `output_dir` write where the script runs."""
    monkeypatch.chdir(tmp_path)


def imdb() -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 3})


def question_answer() -> Dataset:
    return Dataset.from_dict({"question": QUESTIONS, "answer": ANSWERS})


def short(**options: Any) -> SFTConfig:
    """The page's `SFTConfig(...)`, with fewer steps."""
    fewer = {"output_dir": "out", "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return SFTConfig(**{**fewer, "disable_tqdm": True, **options})


def spelled(tokenizer: Any, row: dict[str, Any], *, trained_only: bool = False) -> str:
    ids = [token for token in row["labels"] if token >= 0] if trained_only else row["input_ids"]
    return tokenizer.decode(ids)


# Quickstart


def test_quickstart_by_name(opt: str) -> None:
    training_args = SFTConfig(max_length=512, output_dir="out", num_train_epochs=1)
    trainer = SFTTrainer(opt, train_dataset=imdb(), args=training_args)
    assert spelled(trainer.processing_class, trainer.train_dataset[0]) == f"<|endoftext|>{TEXTS[0]}<|endoftext|>"
    assert trainer.train().metrics["train_loss"] > 0


def test_quickstart_with_a_model_object(opt: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(opt)
    trainer = SFTTrainer(model, train_dataset=imdb(), args=short())
    assert trainer.model is model
    trainer.train()


def test_quickstart_without_args_and_plain_training_arguments(opt: str) -> None:
    assert Path(SFTTrainer(model=opt, train_dataset=imdb()).args.output_dir).name == f"{Path(opt).name}-SFT"
    plain = SFTTrainer(opt, args=TrainingArguments(output_dir="out", max_steps=3), train_dataset=imdb())
    assert (type(plain.args), plain.args.max_steps) == (SFTConfig, 3)


def test_options_given_to_the_trainer_itself_as_until_2024(opt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)
    trainer = SFTTrainer(
        opt,
        args=short(),
        train_dataset=imdb(),
        dataset_text_field="text",
        max_seq_length=8,
        tokenizer=tokenizer,
        neftune_noise_alpha=5,
        torch_dtype=torch.bfloat16,
    )
    assert trainer.processing_class is tokenizer
    assert trainer.model.dtype is torch.bfloat16
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 8
    trainer.train()


def test_max_seq_length_is_max_length(opt: str) -> None:
    trainer = SFTTrainer(opt, train_dataset=imdb(), args=short(max_seq_length=6))
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [6] * 6


# Train on completions only


def instruction_output() -> Dataset:
    return Dataset.from_dict({"instruction": QUESTIONS, "output": ANSWERS})


def formatting_prompts_func(example: dict[str, Any]) -> list[str]:
    output_texts = []
    for i in range(len(example["instruction"])):
        output_texts.append(f"### Question: {example['instruction'][i]}\n ### Answer: {example['output'][i]}")
    return output_texts


def test_completions_only_with_a_response_template(opt: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(opt), AutoTokenizer.from_pretrained(opt)
    collator = DataCollatorForCompletionOnlyLM(" ### Answer:", tokenizer=tokenizer)
    trainer = SFTTrainer(
        model,
        train_dataset=instruction_output(),
        args=short(),
        formatting_func=formatting_prompts_func,
        data_collator=collator,
    )
    batch = collator(list(trainer.train_dataset))
    trained = {tokenizer.decode(row[row >= 0]) for row in batch["labels"]}
    assert trained == {f" {answer}<|endoftext|>" for answer in ANSWERS}
    trainer.train()
    assert collator.num_rows_without_template == 0


def test_completions_only_with_an_instruction_template(opt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)
    text = "### Human: Hello### Assistant: Hi### Human: Two lamps### Assistant: Fine"
    collator = DataCollatorForCompletionOnlyLM(
        instruction_template="### Human:", response_template="### Assistant:", tokenizer=tokenizer, mlm=False
    )
    trainer = SFTTrainer(
        opt, args=short(), train_dataset=Dataset.from_dict({"text": [text] * 2}), data_collator=collator
    )
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    assert tokenizer.decode(labels[labels >= 0]) == " Hi Fine<|endoftext|>"
    trainer.train()


def test_completions_only_with_token_ids(opt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)
    dataset = Dataset.from_dict({"text": ["### User: Hello\n\n### Assistant: Hi, how can I help you?"]})
    response_template_with_context = "\n### Assistant:"
    response_template_ids = tokenizer.encode(response_template_with_context, add_special_tokens=False)[1:]
    data_collator = DataCollatorForCompletionOnlyLM(response_template_ids, tokenizer=tokenizer)
    trainer = SFTTrainer(opt, args=short(), train_dataset=dataset, data_collator=data_collator)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    assert tokenizer.decode(labels[labels >= 0]) == " Hi, how can I help you?<|endoftext|>"


def test_completions_only_with_a_template_that_is_nowhere_says_so_before_training(opt: str) -> None:
    collator = DataCollatorForCompletionOnlyLM("### Reply:", tokenizer=AutoTokenizer.from_pretrained(opt))
    with pytest.raises(ValueError, match=r"none of the 6 rows has response_template '### Reply:' = \["):
        SFTTrainer(opt, args=short(), train_dataset=imdb(), data_collator=collator)


def test_completions_only_with_prompt_and_completion(opt: str) -> None:
    rows = Dataset.from_dict({"prompt": QUESTIONS, "completion": ANSWERS})
    trainer = SFTTrainer(opt, args=short(), train_dataset=rows)
    assert spelled(trainer.processing_class, trainer.train_dataset[3], trained_only=True) == "6<|endoftext|>"
    whole = SFTTrainer(opt, args=short(completion_only_loss=False), train_dataset=rows).train_dataset[3]
    assert whole["labels"] == whole["input_ids"]


def test_assistant_messages_only_without_generation_marks(qwen: str) -> None:
    rows = Dataset.from_dict({"messages": CHATS})
    trainer = SFTTrainer(qwen, args=short(assistant_only_loss=True), train_dataset=rows)
    assert spelled(trainer.processing_class, trainer.train_dataset[4], trained_only=True) == "8<|im_end|>"
    trainer.train()


# Add special tokens for chat format


def test_chat_format_is_set_up_and_trained(opt: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(opt), AutoTokenizer.from_pretrained(opt)
    model, tokenizer = setup_chat_format(model, tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    trainer = SFTTrainer(
        model, args=short(), train_dataset=Dataset.from_dict({"messages": CHATS}), processing_class=tokenizer
    )
    assert spelled(tokenizer, trainer.train_dataset[0]).startswith("<|im_start|>system\nYou are helpful<|im_end|>")
    trainer.train()


def test_chat_template_is_cloned(opt: str, qwen: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(opt), AutoTokenizer.from_pretrained(opt)
    model, tokenizer, added = clone_chat_template(model, tokenizer, qwen)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(qwen).chat_template
    assert added == []


def test_eos_token_is_aligned_by_an_option(opt: str) -> None:
    trainer = SFTTrainer(opt, args=short(eos_token="<|im_end|>"), train_dataset=imdb())
    assert spelled(trainer.processing_class, trainer.train_dataset[0]).endswith("dog.<|im_end|>")


# Dataset format support


def test_formats_are_read_from_json_lines_and_packed(qwen: str, tmp_path: Path) -> None:
    file = tmp_path / "dataset.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(qwen, args=short(packing=True, max_length=256), train_dataset=dataset)
    assert sum(len(row["seq_lengths"]) for row in trainer.train_dataset) == 6
    trainer.train()


def test_instruction_format(qwen: str) -> None:
    dataset = Dataset.from_dict({"prompt": ["<prompt text>"] * 2, "completion": ["<ideal generated text>"] * 2})
    trainer = SFTTrainer(qwen, args=short(packing=True), train_dataset=dataset)
    assert spelled(trainer.processing_class, trainer.train_dataset[0], trained_only=True).count("<ideal") == 2


# Format your input prompts


def test_formatting_function_for_one_example_and_for_a_batch(opt: str) -> None:
    texts = []
    for function in (format_one, format_batch):
        trainer = SFTTrainer(opt, args=short(), train_dataset=question_answer(), formatting_func=function)
        texts.append([spelled(trainer.processing_class, row) for row in trainer.train_dataset])
    trainer.train()
    assert texts[0] == texts[1]
    assert texts[0][1] == "<|endoftext|>### Question: What is 1 and 1?\n ### Answer: 2<|endoftext|>"


def format_one(example: dict[str, Any]) -> str:
    return f"### Question: {example['question']}\n ### Answer: {example['answer']}"


def format_batch(example: dict[str, Any]) -> list[str]:
    output_texts = []
    for i in range(len(example["question"])):
        output_texts.append(f"### Question: {example['question'][i]}\n ### Answer: {example['answer'][i]}")
    return output_texts


# Tool calling


def test_tool_calls_with_the_tools_column(opt: str) -> None:
    model, tokenizer = setup_chat_format(AutoModelForCausalLM.from_pretrained(opt), AutoTokenizer.from_pretrained(opt))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    chat = [
        {"role": "user", "content": "How warm is Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "20"},
        {"role": "assistant", "content": "20 degrees."},
    ]
    schema = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Temperature",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    dataset = Dataset.from_list([{"messages": chat, "tools": json.dumps([schema])}])
    trainer = SFTTrainer(model, args=short(assistant_only_loss=True), train_dataset=dataset, processing_class=tokenizer)
    trained = spelled(tokenizer, trainer.train_dataset[0], trained_only=True)
    assert '"weather"' in trained
    assert trained.endswith("20 degrees.<|im_end|>")
    trainer.train()


# Packing


def test_packing_and_eval_packing(opt: str) -> None:
    trainer = SFTTrainer(opt, args=short(packing=True, eval_packing=False), train_dataset=imdb(), eval_dataset=imdb())
    assert "seq_lengths" in trainer.train_dataset.column_names
    assert len(trainer.eval_dataset) == 6
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_packing_with_a_formatting_function(opt: str) -> None:
    trainer = SFTTrainer(opt, train_dataset=question_answer(), args=short(packing=True), formatting_func=format_one)
    assert spelled(trainer.processing_class, trainer.train_dataset[0]).count("### Question") == 6
    trainer.train()


def test_constant_length_data_set_is_trained_as_it_is(opt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)
    rows = ConstantLengthDataset(
        tokenizer, imdb(), dataset_text_field="text", seq_length=16, infinite=True, num_of_sequences=2
    )
    trainer = SFTTrainer(opt, args=short(max_steps=2), train_dataset=rows, processing_class=tokenizer)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (1, 2 * 16)
    trainer.train()


def test_options_of_the_constant_length_data_set(opt: str) -> None:
    args = short(packing=True, max_seq_length=16, num_of_sequences=4, chars_per_token=2.5)
    args.dataset_kwargs = {"add_special_tokens": False, "append_concat_token": False}
    trainer = SFTTrainer(opt, args=args, train_dataset=imdb())
    rows = trainer.train_dataset
    assert {len(row["input_ids"]) for row in rows} == {16}
    eos = trainer.processing_class.eos_token_id  # this tokenizer's bos too
    assert not any(eos in row["input_ids"] for row in rows)
    trainer.train()


def test_formatted_texts_are_packed_in_that_way_whatever_their_column_is_called(opt: str) -> None:
    args = short(packing=True, max_seq_length=16, num_of_sequences=4, dataset_text_field="body")
    trainer = SFTTrainer(opt, args=args, train_dataset=imdb(), formatting_func=lambda example: example["text"])
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {16}


# Control over the pretrained model


def test_model_init_kwargs(opt: str) -> None:
    training_args = short(model_init_kwargs={"torch_dtype": "bfloat16", "attn_implementation": "eager"})
    trainer = SFTTrainer(opt, train_dataset=imdb(), args=training_args)
    assert trainer.model.dtype is torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()


# Training adapters


def test_adapter_is_trained_and_only_the_adapter_saved(qwen: str) -> None:
    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules="all-linear",
        modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        qwen, train_dataset=Dataset.from_dict({"messages": CHATS}), args=short(), peft_config=peft_config
    )
    trainer.train()
    trainer.save_model("saved")
    assert Path("saved/adapter_model.safetensors").is_file()
    assert not Path("saved/model.safetensors").exists()


def test_the_pages_own_misspelt_module_is_named(qwen: str) -> None:
    peft_config = LoraConfig(modules_to_save=["lm_head", "embed_token"], target_modules="all-linear")
    with pytest.raises(ValueError, match="did you mean 'embed_tokens'"):
        SFTTrainer(qwen, train_dataset=imdb(), args=short(), peft_config=peft_config)


def test_adapter_is_continued(qwen: str) -> None:
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(qwen), LoraConfig(target_modules="all-linear"))
    first.save_pretrained("adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen), "adapter", is_trainable=True)
    trainer = SFTTrainer(model, train_dataset=imdb(), args=short(learning_rate=1e-2))
    before = {name: value.clone() for name, value in model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters() if name in before)


def test_callbacks_are_called(opt: str) -> None:
    seen: list[str] = []

    class Saving(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(type(kwargs["model"]).__name__)

    peft_config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    args = short(save_strategy="steps", save_steps=1)
    SFTTrainer(opt, args=args, train_dataset=imdb(), peft_config=peft_config, callbacks=[Saving()]).train()
    assert set(seen) == {"PeftModelForCausalLM"}
    assert Path("out/checkpoint-1/adapter_model.safetensors").is_file()


def test_adapter_on_an_8_bit_base(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    tiny_tokenizer().save_pretrained(folder)
    tiny_model(hidden_size=64, intermediate_size=64).to(torch.float16).save_pretrained(folder)
    model_by_name = {"load_in_8bit": True}
    peft_config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
    )
    trainer = SFTTrainer(str(folder), train_dataset=imdb(), args=short(), peft_config=peft_config, **model_by_name)
    assert trainer.model.get_base_model().is_loaded_in_8bit
    norm = trainer.model.get_base_model().model.norm.weight
    assert (norm.dtype, norm.requires_grad) == (torch.float32, False)  # prepared for k-bit training
    trainer.train()


# Flash Attention


def test_flash_attention_1_around_train(opt: str) -> None:
    trainer = SFTTrainer(opt, args=short(packing=True), train_dataset=imdb())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        trainer.train()


def test_flash_attention_1_as_the_page_spells_it(opt: str) -> None:
    trainer = SFTTrainer(opt, args=short(packing=True), train_dataset=imdb())
    with torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False):
        trainer.train()


def test_flash_attention_2_without_a_gpu_says_what_is_missing(opt: str) -> None:
    arguments = {"attn_implementation": "flash_attention_2", "torch_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="flash_attention_2"):
        SFTTrainer(opt, args=short(model_init_kwargs=arguments), train_dataset=imdb())


# The model creation utility


def test_model_config_builds_model_quantization_and_adapter(opt: str) -> None:
    training_args = short()
    model_args = ModelConfig(
        model_name_or_path=opt, attn_implementation=None, torch_dtype="bfloat16", use_peft=True, lora_r=4
    )
    torch_dtype = (
        model_args.torch_dtype if model_args.torch_dtype in ["auto", None] else getattr(torch, model_args.torch_dtype)
    )
    quantization_config = get_quantization_config(model_args)
    model_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "torch_dtype": torch_dtype,
        "use_cache": not training_args.gradient_checkpointing,
        "device_map": get_kbit_device_map() if quantization_config is not None else None,
        "quantization_config": quantization_config,
    }
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
    training_args.model_init_kwargs = model_kwargs
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=imdb(),
        peft_config=get_peft_config(model_args),
    )
    assert trainer.model.get_base_model().dtype is model.dtype is torch.bfloat16
    trainer.train()


# NEFTune


def test_neftune_is_off_again_after_training(opt: str) -> None:
    trainer = SFTTrainer(opt, train_dataset=imdb(), args=short(neftune_noise_alpha=5))
    trainer.train()
    model = trainer.model.train()
    ids = torch.tensor([[5, 6, 7]])
    embed = model.get_input_embeddings()
    assert torch.equal(embed(ids), embed(ids))


# unsloth


def test_models_of_unsloth_pass_through(qwen: str) -> None:
    """`FastLanguageModel` hands out a `PeftModel` with marks of its own; it is trained as it is."""
    base = AutoModelForCausalLM.from_pretrained(qwen)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.for_training = model.for_inference = lambda: model
    model.max_seq_length = base.max_seq_length = 128
    trainer = SFTTrainer(model=model, args=short(max_length=128), train_dataset=imdb())
    assert trainer.model is model
    trainer.train()


# Best practices, multi-GPU, checkpointing


def test_max_length_is_at_most_1024_or_the_tokenizers_limit(opt: str) -> None:
    long = Dataset.from_dict({"text": ["fox " * 3000]})
    trainer = SFTTrainer(opt, train_dataset=long, args=short())
    assert len(trainer.train_dataset[0]["input_ids"]) == 1024


def test_device_map_by_process_and_checkpointing_without_reentry(opt: str) -> None:
    device_string = "cpu"
    model = AutoModelForCausalLM.from_pretrained(opt, device_map={"": device_string})
    args = short(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    SFTTrainer(model, args=args, train_dataset=imdb()).train()


# Datasets


@pytest.mark.parametrize("packing", [False, True])
def test_streamed_data_set(opt: str, packing: bool) -> None:
    stream = imdb().to_iterable_dataset()
    trainer = SFTTrainer(opt, args=short(max_steps=2, packing=packing), train_dataset=stream)
    assert isinstance(trainer.train_dataset, IterableDataset)
    trainer.train()


@pytest.mark.parametrize("streamed", [False, True])
def test_tokenized_data_set_is_used_as_it_is(opt: str, streamed: bool) -> None:
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    dataset: Any = Dataset.from_dict({"input_ids": ids})
    trainer = SFTTrainer(opt, args=short(), train_dataset=dataset.to_iterable_dataset() if streamed else dataset)
    assert [row["input_ids"] for row in trainer.train_dataset] == ids
    trainer.train()


def test_skip_prepare_dataset_hands_the_rows_to_the_collator(opt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(opt)

    def collate_fn(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = tokenizer([example["text"] for example in examples], return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[labels == tokenizer.pad_token_id] = -100
        batch["labels"] = labels
        return batch

    training_args = short()
    training_args.remove_unused_columns = False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    dataset = imdb()
    trainer = SFTTrainer(
        model=opt, args=training_args, data_collator=collate_fn, train_dataset=dataset, processing_class=tokenizer
    )
    assert trainer.train_dataset is dataset
    assert trainer.train().metrics["train_loss"] > 0


def test_shuffled_packing_repeats_itself(opt: str) -> None:
    args = [short(packing=True, max_length=16, num_of_sequences=4) for _ in range(2)]
    first, second = (SFTTrainer(opt, args=each, train_dataset=imdb()).train_dataset for each in args)
    assert first["input_ids"][:] == second["input_ids"][:]
