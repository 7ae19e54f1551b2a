"""What becomes of each key of a configuration of another project, and the params.yaml that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.__main__ import main
from stages.importing.command import as_params, import_configuration
from stages.importing.draft import Draft, Effect
from stages.params.schema import load_params

AXOLOTL = """
base_model: org/base-1b
datasets:
  - path: org/chats
    type: chat_template
    field_messages: dialog
    message_property_mappings: {role: speaker, content: line}
    split: train[:20%]
    roles: {assistant: [bot], user: [customer]}
val_set_size: 0.05
sequence_len: 1024
sample_packing: true
adapter: qlora
load_in_4bit: true
lora_r: 8
lora_alpha: 32
lora_dropout: 0
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 1e-4
warmup_ratio: 0.1
bf16: auto
evals_per_epoch: 2
saves_per_epoch: 1
flash_attention: true
weight_decay: 0.01
wandb_project:
qat: {activation_dtype: int8}
sequnce_len: 5
"""


def imported(folder: Path, peer: str, text: str, name: str = "config.yml", **options: Any) -> Draft:
    """Import a configuration and check that its params.yaml is valid."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    draft = import_configuration(peer, [str(file)], **options)
    target = folder / "params.yaml"
    target.write_text(as_params(draft), encoding="utf-8")
    load_params(target)
    return draft


def effects(draft: Draft) -> dict[str, Effect]:
    return {row.key: row.effect for row in draft.rows}


def written(folder: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text(encoding="utf-8"))


def test_axolotl_keys_become_values_of_the_same_effect(tmp_path: Path) -> None:
    draft = imported(tmp_path, "axolotl", AXOLOTL)
    values = written(tmp_path)
    assert values["load"]["sources"] == [
        {
            "path": "org/chats",
            "hub": True,
            "columns": {"dialog": "messages"},
            "message_keys": {"speaker": "role", "line": "content"},
            "split": "train[:20%]",
            "roles": {"customer": "user"},
        }
    ]
    assert values["load"]["eval"] == {"path": None, "fraction": 0.05, "count": None}
    assert (values["pack"]["max_length"], values["pack"]["strategy"]) == (1024, "bfd")
    train = values["train"]
    assert (train["method"], train["lora_r"], train["lora_alpha"], train["lora_target_modules"]) == (
        "qlora",
        8,
        32,
        "all-linear",
    )
    assert (train["eval_steps"], train["save_steps"], train["optim"]) == (0.25, 0.5, "adamw_bnb_8bit")
    assert (train["mixed_precision"], values["model"]["dtype"]) == ("bf16", "bfloat16")
    assert values["model"]["attn_implementation"] == "flash_attention_2"
    found = effects(draft)
    assert {key for key, effect in found.items() if effect is Effect.UNSUPPORTED} == {"qat", "sequnce_len"}
    assert {key for key, effect in found.items() if effect is Effect.NEAREST} == set()
    (unknown,) = [row for row in draft.rows if row.key == "sequnce_len"]
    assert unknown.note == "not an option of Axolotl that is known here; did you mean 'sequence_len'?"


def test_no_key_is_lost(tmp_path: Path) -> None:
    draft = imported(tmp_path, "axolotl", AXOLOTL)
    top = {row.key.split("[")[0].split(".")[0] for row in draft.rows}
    assert top == set(draft.source)


def test_axolotl_prompts_become_templates_of_prompt_and_completion(tmp_path: Path) -> None:
    text = "base_model: a/b\ndatasets: [{path: a/d, type: alpaca}]\nlearning_rate: 1e-4\nval_set_size: 0\n"
    draft = imported(tmp_path, "axolotl", text)
    (source,) = written(tmp_path)["load"]["sources"]
    assert source["template"]["completion"] == "{{ output }}"
    assert source["template"]["prompt"].startswith("{% if input is defined and input %}")
    assert written(tmp_path)["load"]["eval"]["count"] == 20
    assert effects(draft)["val_set_size"] is Effect.NEAREST


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rl: 'dpo' asks for preference or reinforcement learning"):
        imported(tmp_path, "axolotl", "base_model: a/b\nrl: dpo\n")
    with pytest.raises(ValueError, match="stage: 'dpo' is not supervised fine-tuning"):
        imported(tmp_path, "llamafactory", "model_name_or_path: a/b\nstage: dpo\n")


LLAMAFACTORY = """
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: shop,notes
template: qwen3_nothink
cutoff_len: 2048
max_samples: 100
packing: false
output_dir: saves/x
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
deepspeed: examples/deepspeed/ds_z3_offload_config.json
val_size: 0.1
mask_history: true
use_badam: true
"""
INFO = {
    "shop": {
        "file_name": "shop.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "kunde", "assistant_tag": "berater"},
    },
    "notes": {"hf_hub_url": "org/notes", "columns": {"prompt": "q", "response": "a"}},
}


def test_llamafactory_keys_and_data_sets(tmp_path: Path) -> None:
    info = tmp_path / "info.json"
    info.write_text(json.dumps(INFO), encoding="utf-8")
    draft = imported(tmp_path, "llamafactory", LLAMAFACTORY, dataset_info=str(info), processes=4)
    values = written(tmp_path)
    assert values["load"]["sources"] == [
        {
            "path": "data/shop.json",
            "columns": {"talk": "messages"},
            "message_keys": {"who": "role", "says": "content"},
            "roles": {"kunde": "user", "berater": "assistant"},
            "max_rows": 100,
        },
        {
            "path": "org/notes",
            "hub": True,
            "template": {"user": "{{ q }}", "assistant": "{{ a }}"},
            "max_rows": 100,
        },
    ]
    assert values["format"]["train_on"] == "last_assistant"
    assert values["format"]["chat_template"] == "data/chat_template.jinja"
    assert (values["train"]["launch"]["engine"], values["train"]["launch"]["processes"]) == ("accelerate.yaml", 4)
    assert json.loads(draft.files["accelerate.yaml"])["deepspeed_config"] == {
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
    }
    assert (values["train"]["lora_alpha"], values["train"]["gradient_checkpointing"]) == (16, True)
    found = effects(draft)
    assert found["use_badam"] is Effect.UNSUPPORTED
    assert found["template"] is Effect.SAME


def test_trl_command_line(tmp_path: Path) -> None:
    line = (
        "accelerate launch --num_processes 2 sft.py --model_name_or_path org/m --dataset_name org/d --use_peft "
        "--lora_r 8 --lora_target_modules q_proj v_proj --packing --learning_rate 2.0e-4 --max_length 512 "
        "--assistant_only_loss true --eval_strategy steps --eval_steps 100 --gradient_checkpointing"
    )
    draft = import_configuration("trl", line.split())
    (tmp_path / "params.yaml").write_text(as_params(draft), encoding="utf-8")
    values = written(tmp_path)
    assert values["load"]["sources"] == [{"path": "org/d", "hub": True}]
    assert values["train"]["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (values["pack"]["strategy"], values["pack"]["max_length"]) == ("bfd", 512)
    assert (values["format"]["train_on"], values["train"]["launch"]["processes"]) == ("assistant", 2)
    assert (values["train"]["eval_steps"], values["train"]["method"], values["train"]["lora_dropout"]) == (
        100,
        "lora",
        0.05,
    )
    assert {row.effect for row in draft.rows} == {Effect.SAME}


NOTEBOOK = [
    "!pip install unsloth\nmax_seq_length = 2048",
    "model, tokenizer = FastLanguageModel.from_pretrained(\n    model_name = 'unsloth/Llama-3.2-1B-Instruct',\n"
    "    max_seq_length = max_seq_length, load_in_4bit = True, token = SECRET)",
    "model = FastLanguageModel.get_peft_model(model, r = 32, lora_alpha = 64, lora_dropout = 0, bias = 'none',\n"
    "    target_modules = ['q_proj', 'v_proj'], use_gradient_checkpointing = 'unsloth', random_state = 3407)",
    "dataset = load_dataset('org/chats', split = 'train')",
    "trainer = SFTTrainer(model = model, train_dataset = dataset, args = SFTConfig(\n"
    "    per_device_train_batch_size = 2, max_steps = 60, learning_rate = 2e-4, optim = 'adamw_8bit',\n"
    "    fp16 = not is_bfloat16_supported(), warmup_steps = 5, seed = 3407, report_to = 'none'))",
    "trainer = train_on_responses_only(trainer, instruction_part = 'U', response_part = 'A')",
]


def test_unsloth_notebook_is_read_without_running_it(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": [cell]} for cell in NOTEBOOK]
    draft = imported(tmp_path, "unsloth", json.dumps({"cells": cells}), name="notebook.ipynb")
    values = written(tmp_path)
    train = values["train"]
    assert values["model"]["name_or_path"] == "unsloth/Llama-3.2-1B-Instruct"
    assert (values["pack"]["max_length"], values["load"]["sources"][0]["path"]) == (2048, "org/chats")
    assert (train["method"], train["lora_r"], train["lora_alpha"], train["warmup_steps"]) == ("qlora", 32, 64, 5)
    assert (train["max_steps"], train["optim"], train["seed"]) == (60, "adamw_8bit", 3407)
    assert values["format"]["train_on"] == "assistant"
    assert not [row for row in draft.rows if row.effect is Effect.UNSUPPORTED]


def test_command_writes_once_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yml"
    config.write_text(AXOLOTL, encoding="utf-8")
    words = ["import", "axolotl", str(config), "--root", str(tmp_path)]
    assert main(words, through_dvc=True) == 0
    shown = capsys.readouterr().out
    assert "not supported (2)" in shown
    assert shown.rstrip().endswith("keys have the same effect or are irrelevant. Next: sft check")
    load_params(tmp_path / "params.yaml")
    assert main(words, through_dvc=True) == 1
    assert "exists; state --force to replace it" in capsys.readouterr().err
    assert main([*words, "--force", "--json"], through_dvc=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert {entry["effect"] for entry in result["keys"]} == {"same effect", "not supported"}
    assert main(["import", "axolotl", "none.yml", "--root", str(tmp_path / "x")], through_dvc=True) == 1
    assert "none.yml: no such file" in capsys.readouterr().err


def test_the_order_of_rows_is_kept_where_the_source_keeps_it(tmp_path: Path) -> None:
    keys = "curriculum_sampling: true\nsample_packing_sequentially: true\n"
    draft = imported(tmp_path, "axolotl", AXOLOTL + keys)
    values = written(tmp_path)
    assert (values["pack"]["strategy"], values["train"]["order"]) == ("in_order", "sequential")
    assert effects(draft)["sample_packing_sequentially"] is Effect.SAME
    info = tmp_path / "info.json"
    info.write_text(json.dumps(INFO), encoding="utf-8")
    text = LLAMAFACTORY.replace("packing: false", "neat_packing: true\ndisable_shuffling: true")
    imported(tmp_path, "llamafactory", text, dataset_info=str(info))
    values = written(tmp_path)
    assert (values["pack"]["strategy"], values["train"]["order"]) == ("in_order", "sequential")


def test_trackers_and_streams_are_those_of_the_source(tmp_path: Path) -> None:
    text = AXOLOTL.replace("wandb_project:", "wandb_project: shop\nuse_tensorboard: true\nstreaming: true")
    draft = imported(tmp_path, "axolotl", text)
    values = written(tmp_path)
    assert values["train"]["report_to"] == ["mlflow", "wandb", "tensorboard"]
    assert values["publish"]["experiment"] == "shop"
    assert values["load"]["sources"][0]["streaming"] is True
    assert {effects(draft)[key] for key in ("wandb_project", "use_tensorboard", "streaming")} == {Effect.SAME}
    info = tmp_path / "info.json"
    info.write_text(json.dumps(INFO), encoding="utf-8")
    text = LLAMAFACTORY + "report_to: [trackio, comet_ml]\nstreaming: true\n"
    draft = imported(tmp_path, "llamafactory", text, dataset_info=str(info))
    values = written(tmp_path)
    assert values["train"]["report_to"] == ["mlflow", "trackio"]
    assert effects(draft)["report_to"] is Effect.NEAREST
    assert [source.get("streaming") for source in values["load"]["sources"]] == [None, True]
    imported(tmp_path, "llamafactory", LLAMAFACTORY + "report_to: none\n", dataset_info=str(info))
    assert written(tmp_path)["train"]["report_to"] == ["mlflow"]


def test_llamafactory_mixtures_are_interleaved_here(tmp_path: Path) -> None:
    info = tmp_path / "info.json"
    info.write_text(json.dumps(INFO), encoding="utf-8")
    text = LLAMAFACTORY + "mix_strategy: interleave_over\ninterleave_probs: 0.7,0.3\nseed: 5\n"
    draft = imported(tmp_path, "llamafactory", text, dataset_info=str(info))
    values = written(tmp_path)
    assert values["load"]["interleave"] == {"strategy": "all_exhausted", "seed": 5}
    assert [source["share"] for source in values["load"]["sources"]] == [0.7, 0.3]
    assert {effects(draft)[key] for key in ("mix_strategy", "interleave_probs")} == {Effect.SAME}
