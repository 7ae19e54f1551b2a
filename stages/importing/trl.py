"""What becomes of each option of trl's script sft.py: a YAML file of `--config`, a command line, or both.

Source: trl's SFTConfig, ModelConfig, ScriptArguments and DatasetMixtureConfig (0.15 to 1.16), and
transformers.TrainingArguments.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.importing import trainer
from stages.importing.draft import (
    Draft,
    Rule,
    always,
    apply_rules,
    approach,
    by_name,
    finish,
    ignore,
    is_on,
    keep,
    part_of,
    refuse,
)
from stages.importing.places import FORMATS_OF_FILES, TEMPLATE_FILE, is_local, local_path, read_yaml
from stages.importing.trainer import number, whole

DEFAULTS: dict[str, Any] = {
    **trainer.DEFAULTS,
    **trainer.ROWS_AS_THERE,
    "train.learning_rate": 2e-5,
    "train.logging_steps": 10,
    "train.gradient_checkpointing": True,
    "train.mixed_precision": "bf16",
    "train.method": "full",
    "train.lora_r": 16,
    "train.lora_alpha": 32,
    "train.lora_dropout": 0.05,
    "pack.max_length": 1024,
    "pack.strategy": "none",
    "pack.overflow": "truncate",
    "format.train_on": "all",
}
"""Values of trl 1.16 for what is not stated."""

LISTS = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "report_to", "label_names")
"""Options that take several words on a command line."""


def read(source: list[str], processes: int) -> Draft:
    """Read a YAML file, or the words of a command line such as `accelerate launch sft.py --learning_rate 1e-4`.

    Raises:
        ValueError: It can't be read.
    """
    text = " ".join(source)
    first = Path(source[0])
    if len(source) == 1 and first.suffix in (".yaml", ".yml", ".json") and " " not in source[0]:
        values: dict[str, Any] = read_yaml(first)
    else:
        values, count = parse_words(shlex.split(text.replace("\\\n", " ")))
        processes = max(processes, count)
    return fill(values, processes)


def fill(
    values: dict[str, Any], processes: int = 1, *, defaults: dict[str, Any] | None = None, peer: str = "trl"
) -> Draft:
    """Return the import of options by name."""
    draft = Draft(peer, values, processes, defaults=defaults or DEFAULTS)
    apply_rules(draft, RULES)
    is_adapted = draft.is_on("use_peft", "load_in_4bit")
    if not is_adapted:
        draft.values["train.method"] = "full"
    loads = str(draft.get("dtype", "torch_dtype", default="float32" if peer == "trl" else "bfloat16")).removeprefix(
        "torch."
    )
    kinds = {"auto": "bfloat16", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
    draft.values["model.dtype"] = kinds.get(loads, loads if loads in ("bfloat16", "float16") else "float32")
    if draft.is_on("fp16") and "bf16" not in values:
        draft.values["train.mixed_precision"] = "fp16"
    _trained_part(draft)
    if draft.is_on("load_in_4bit"):
        draft.values["model.dtype"] = "bfloat16"
    finish(draft)
    return draft


def _trained_part(draft: Draft) -> None:
    """What is trained depends on the rows: completions of pairs, everything of conversations and text."""
    if "format.train_on" in draft.values:
        return
    draft.values["format.train_on"] = "all"
    draft.hints.append(
        "without assistant_only_loss, trl trains whole conversations and texts, but only the completions of rows with "
        "prompt and completion; for those, state format.train_on: completion"
    )


def parse_words(words: list[str]) -> tuple[dict[str, Any], int]:
    """Return the options of a command line, and its number of processes.

    Raises:
        ValueError: It has no options.
    """
    values: dict[str, Any] = {}
    processes = 1
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--"):
            continue
        name, equals, given = word[2:].partition("=")
        found = [given] if equals else []
        while (
            not equals and index < len(words) and not words[index].startswith("--") and not words[index].endswith(".py")
        ):
            found.append(words[index])
            index += 1
        name = name.replace("-", "_")
        if name in ("num_processes", "nproc_per_node"):
            processes = int(found[0]) if found and found[0].isdecimal() else processes
            continue
        if name in LAUNCHER:
            continue
        if name == "config" and found:
            values = {**read_yaml(Path(found[0])), **values}
            continue
        many = len(found) > 1 or name in LISTS
        values[name] = [_value(item) for item in found] if many else _value(found[0]) if found else True
    if not values:
        raise ValueError("the command line has no options such as --model_name_or_path; quote it, or put -- before it")
    return values, processes


LAUNCHER = (
    "config_file", "main_process_port", "machine_rank", "num_machines", "main_process_ip", "rdzv_endpoint", "nnodes",
    "mixed_precision", "standalone", "master_port", "master_addr", "node_rank", "dynamo_backend", "gpu_ids",
    "multi_gpu",
)  # fmt: skip
"""Options of accelerate launch and torchrun."""


def _value(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dataset(draft: Draft, key: str, value: Any) -> None:
    source = _source_of(draft, str(value))
    if source.get("hub"):
        source |= {"config": str(draft.get("dataset_config"))} if draft.get("dataset_config") else {}
        split = str(draft.get("dataset_train_split", default="train"))
        source |= {"split": split} if split != "train" else {}
        source |= {"streaming": True} if draft.is_on("dataset_streaming") else {}
        source |= {"revision": str(draft.get("dataset_revision"))} if draft.get("dataset_revision") else {}
    column = str(draft.get("dataset_text_field", default="text"))
    if column not in ("text", "messages"):
        source["columns"] = {column: "text"}
    draft.values["load.sources"] = [*draft.values.get("load.sources", []), source]
    draft.same(key, value, "load.sources")


def _source_of(draft: Draft, path: str) -> dict[str, Any]:
    if "://" in path:
        return {"path": path}
    if is_local(path):
        place = local_path(path)
        if place != path:
            draft.hints.append(f"copy {path} to {place}, where DVC sees its changes")
        return {"path": place}
    return {"path": path, "hub": True}


def _mixture(draft: Draft, key: str, value: Any) -> None:
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        place = f"{key}[{index}]"
        if not isinstance(entry, Mapping):
            entry = {"path": entry}
        source = _source_of(draft, str(entry.get("path")))
        if str(entry.get("path")) in FORMATS_OF_FILES:
            files = entry.get("data_files")
            source = {"path": local_path(str(files[0] if isinstance(files, list) else files))}
        for name, item in entry.items():
            _mixture_key(draft, f"{place}.{name}", str(name), item, source)
        draft.values["load.sources"] = [*draft.values.get("load.sources", []), source]


def _mixture_key(draft: Draft, key: str, name: str, item: Any, source: dict[str, Any]) -> None:
    if item is None:
        draft.same(key, item, "not set")
    elif name in ("path", "data_files", "data_dir"):
        (draft.same if name != "data_dir" else draft.nearest)(
            key, item, "load.sources[].path" if name != "data_dir" else "state the files of the folder"
        )
    elif name in ("name", "config"):
        source["config"] = str(item)
        draft.same(key, item)
    elif name == "split":
        if source.get("hub"):
            source["split"] = str(item)
        draft.same(key, item)
    elif name == "columns":
        draft.irrelevant(key, item, "columns are found by their names")
    elif name == "fraction":
        source["weight"] = number(item)
        draft.same(key, item, "load.sources[].weight")
    else:
        draft.unsupported(key, item, "not an option of a data set of trl that is known here")


def _test_size(draft: Draft, key: str, value: Any) -> None:
    size = number(value)
    fraction, count = (size, None) if size < 1 else (None, int(size))
    draft.same(key, value, load__eval={"path": None, "fraction": fraction, "count": count})


def _test_split(draft: Draft, key: str, value: Any) -> None:
    if draft.source.get("eval_strategy", draft.source.get("evaluation_strategy", "no")) in ("no", False):
        draft.irrelevant(key, value, "nothing is evaluated there")
    else:
        note = "rows of a second split of the hub are not read; 5 % of the training rows are held out"
        draft.nearest(key, value, note, load__eval={"path": None, "fraction": 0.05, "count": None})


def _length(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, pack__max_length=whole(value))


def _packing(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, pack__strategy="none")
        return
    strategy = str(draft.get("packing_strategy", default="bfd"))
    kinds = {"bfd": "bfd", "bfd_split": "bfd_split", "bfd-requeue": "bfd_split", "wrapped": "wrapped", "ffd": "bfd"}
    chosen = kinds.get(strategy, "bfd")
    overflow = {"bfd_split": "split", "wrapped": "split"}.get(chosen, "truncate")
    draft.same(key, value, "documents of a row do not see each other", pack__strategy=chosen, pack__overflow=overflow)


def _truncation(draft: Draft, key: str, value: Any) -> None:
    if value == "keep_start":
        draft.same(key, value, "as here")
    else:
        draft.nearest(key, value, "the beginning of longer rows is kept")


def _loss(draft: Draft, key: str, value: Any) -> None:
    kinds = {"nll": "nll", "chunked_nll": "nll", "dft": "dft"}
    if value in kinds:
        draft.same(key, value, train__loss_type=kinds[value])
    else:
        draft.unsupported(key, value, "the loss is nll or dft")


def _part(part: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if is_on(value):
            draft.same(key, value, format__train_on=part)
        elif part == "completion":
            draft.same(key, value, format__train_on=draft.values.get("format.train_on", "all"))
        else:
            draft.same(key, value, "off")

    return rule


def _peft(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.same(key, value, train__method="qlora" if draft.is_on("load_in_4bit") else "lora")
    else:
        draft.same(key, value, train__method="full")


def _eight_bits(draft: Draft, key: str, value: Any) -> None:
    approach("the base is in 16 bits, which is more exact and takes twice the memory")(draft, key, value)


def _targets(draft: Draft, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else [str(name) for name in value]
    draft.same(key, value, train__lora_target_modules="all-linear" if names == ["all-linear"] else names)


def _template_path(draft: Draft, key: str, value: Any) -> None:
    path = str(value)
    if path.endswith(".jinja"):
        target = f"data/{Path(path).name}"
        draft.hints.append(f"copy {path} to {target}")
        draft.same(key, value, f"copy it to {target}", format__chat_template=target)
    else:
        note = f"save the template of {path} to {TEMPLATE_FILE} and state it"
        draft.nearest(key, value, note, format__chat_template=None)


def _init_kwargs(draft: Draft, key: str, value: Any) -> None:
    ours = {
        "attn_implementation": "model.attn_implementation",
        "revision": "model.revision",
        "trust_remote_code": "model.trust_remote_code",
    }
    for name, item in value.items() if isinstance(value, Mapping) else ():
        place = f"{key}.{name}"
        if name in ours:
            draft.same(place, item, **{ours[name].replace(".", "__"): item})
        elif name in ("torch_dtype", "dtype"):
            draft.same(place, item, "model.dtype")
        elif name in ("use_cache", "device_map", "low_cpu_mem_usage"):
            draft.irrelevant(place, item, "it does not change the weights")
        else:
            draft.unsupported(place, item, "the base model is loaded as its config.json says")
    if not isinstance(value, Mapping):
        draft.same(key, value, "not set")


def _end_token(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, "the token that ends a turn in the template ends generation")


RULES: dict[str, Rule] = {
    **trainer.trainer_rules(),
    # data
    "dataset_name": _dataset,
    "datasets": _mixture,
    "dataset_config": part_of("dataset_name"),
    "dataset_train_split": part_of("dataset_name"),
    "dataset_test_split": _test_split,
    "dataset_streaming": part_of("dataset_name"),
    "dataset_text_field": part_of("dataset_name"),
    "streaming": part_of("datasets"),
    "test_split_size": _test_size,
    "dataset_kwargs": approach("rows are rendered with the template, or with append_eos for text"),
    "dataset_num_proc": ignore("format.num_proc and pack.num_proc do not change the rows"),
    "dataset_batch_size": ignore("it does not change the rows"),
    "shuffle_dataset": always("packed rows are shuffled in each epoch"),
    "ignore_bias_buffers": ignore("an option of DDP's debugging"),
    "gradient_checkpointing_use_reentrant": ignore("both ways compute the same"),
    # rows
    "max_length": _length,
    "max_seq_length": _length,
    "truncation_mode": _truncation,
    "packing": _packing,
    "packing_strategy": part_of("packing"),
    "eval_packing": ignore("the loss per token does not depend on it"),
    "num_of_sequences": ignore("an option of former packing"),
    "chars_per_token": ignore("an option of former packing"),
    "padding_free": keep("train.padding_free", lambda value: True if is_on(value) else None),
    "pad_to_multiple_of": lambda draft, key, value: (
        draft.irrelevant(key, value, "padding is not part of the loss")
        if isinstance(value, str)
        else by_name(draft, key, value)
    ),
    "assistant_only_loss": _part("assistant"),
    "completion_only_loss": _part("completion"),
    "last_turn_only_loss": _part("last_assistant"),
    "loss_type": _loss,
    "chat_template_path": _template_path,
    "chat_template_kwargs": keep("format.chat_template_kwargs", dict),
    "eos_token": _end_token,
    "pad_token": ignore("padding is not part of the loss"),
    "image_folder": approach("images lie in data/"),
    "activation_offloading": keep("train.activation_offloading", is_on),
    # model
    "model_name_or_path": keep("model.name_or_path", str),
    "model_revision": keep("model.revision", str),
    "dtype": lambda draft, key, value: draft.same(key, value, "model.dtype"),
    "torch_dtype": lambda draft, key, value: draft.same(key, value, "model.dtype"),
    "trust_remote_code": keep("model.trust_remote_code", is_on),
    "attn_implementation": lambda draft, key, value: _attention(draft, key, value),
    "model_init_kwargs": _init_kwargs,
    "use_peft": _peft,
    "lora_r": keep("train.lora_r", whole),
    "lora_alpha": keep("train.lora_alpha", whole),
    "lora_dropout": keep("train.lora_dropout", number),
    "lora_target_modules": _targets,
    "lora_target_parameters": keep("train.lora_target_parameters", list),
    "lora_modules_to_save": keep("train.modules_to_save", list),
    "lora_task_type": refuse("language models alone", off=("CAUSAL_LM",)),
    "use_rslora": keep("train.use_rslora", is_on),
    "use_dora": keep("train.use_dora", is_on),
    "load_in_8bit": _eight_bits,
    "load_in_4bit": lambda draft, key, value: draft.same(
        key, value, **({"train__method": "qlora"} if is_on(value) else {})
    ),
    "bnb_4bit_quant_type": refuse("nf4 is used", off=("nf4",)),
    "use_bnb_nested_quant": ignore("constants are quantized, too"),
    "bnb_4bit_quant_storage": ignore("how the weights are stored"),
    "router_aux_loss_coef": keep("train.router_aux_loss_coef", number),
    "log_entropy": by_name,
    "neftune_noise_alpha": keep("train.neftune_noise_alpha", number),
    "peft_config": approach("state lora_r, lora_alpha, lora_target_modules"),
}
"""Option of trl -> what becomes of it."""


def _attention(draft: Draft, key: str, value: Any) -> None:
    from stages.importing.axolotl import attention

    attention(draft, key, value)
