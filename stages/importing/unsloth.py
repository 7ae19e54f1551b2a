"""What becomes of the constants of an unsloth notebook: the arguments of its well-known calls.

The notebook, or a script, is not run: its calls are read by `ast`, with constants and names that were assigned one.
Source: unsloth's public notebooks and the signatures of `FastLanguageModel.from_pretrained` and `get_peft_model`.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from stages.importing import trl
from stages.importing.draft import Draft, Rule, apply_rules, approach, finish, ignore, is_on, keep, refuse
from stages.importing.places import is_local, local_path
from stages.importing.trainer import number, whole

UNKNOWN = "an expression that is not a constant"

DEFAULTS: dict[str, Any] = {
    **trl.DEFAULTS,
    "train.method": "lora",
    "train.lora_dropout": 0.0,
    "train.lora_alpha": 16,
    "train.learning_rate": 5e-5,
    "format.train_on": "all",
    "model.dtype": "bfloat16",
}
"""Values of unsloth and trl for what a notebook does not state."""

LOADERS = ("FastLanguageModel", "FastVisionModel", "FastModel")


class Expression(str):
    """The source text of a value that is not a constant."""


class _Calls(ast.NodeVisitor):
    """Arguments of the well-known calls, by `call.argument`."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.found: dict[str, Any] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember names that get a constant."""
        value = self._constant(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and not isinstance(value, Expression):
                self.names[target.id] = value
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Record a call that is known."""
        name = _name_of(node.func)
        short = name.rpartition(".")[2]
        if name in tuple(f"{loader}.from_pretrained" for loader in LOADERS):
            self._record("from_pretrained", node, ("model_name", "max_seq_length"))
        elif short == "get_peft_model":
            self._record("get_peft_model", node, ("model",))
        elif short in ("TrainingArguments", "SFTConfig", "UnslothTrainingArguments"):
            self._record("args", node, ())
        elif short in ("SFTTrainer", "UnslothTrainer"):
            self._record("trainer", node, ())
        elif short == "get_chat_template":
            self._record("get_chat_template", node, ("tokenizer", "chat_template", "mapping"))
        elif short == "train_on_responses_only":
            self._record("train_on_responses_only", node, ("trainer", "instruction_part", "response_part"))
        elif short == "load_dataset":
            self._record("load_dataset", node, ("path", "name"))
        elif short in ("save_pretrained_gguf", "push_to_hub_gguf"):
            self._record(short, node, ("path", "tokenizer"))
        self.generic_visit(node)

    def _record(self, call: str, node: ast.Call, positions: tuple[str, ...]) -> None:
        given = {name: self._constant(argument) for name, argument in zip(positions, node.args, strict=False)}
        for keyword in node.keywords:
            if keyword.arg is not None:
                given[keyword.arg] = self._constant(keyword.value)
            else:
                given["**"] = Expression(ast.unparse(keyword.value))
        for name, value in given.items():
            if call == "load_dataset" and f"{call}.{name}" in self.found:
                continue  # the first data set is the training's
            self.found[f"{call}.{name}"] = value

    def _constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return Expression(ast.unparse(node))


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def read(file: Path, processes: int) -> Draft:
    """Read a notebook or a script.

    Raises:
        ValueError: It can't be read, or has none of the calls.
    """
    calls = _Calls()
    for cell in code_of(file):
        try:
            calls.visit(ast.parse(cell))
        except SyntaxError:
            continue
    if not any(name.startswith("from_pretrained.") for name in calls.found):
        known = ", ".join(f"{name}.from_pretrained" for name in LOADERS)
        raise ValueError(f"{file}: no call of {known}, by which an unsloth notebook loads its model")
    draft = Draft("unsloth", calls.found, processes, defaults=DEFAULTS)
    _data(draft)
    apply_rules(draft, _rules(draft.source))
    has_adapter = any(name.startswith("get_peft_model.") for name in calls.found)
    full = is_on(calls.found.get("from_pretrained.full_finetuning"))
    four = is_on(calls.found.get("from_pretrained.load_in_4bit", not full))
    draft.values["train.method"] = "full" if full or not has_adapter else "qlora" if four else "lora"
    if draft.values.get("train.mixed_precision") == "no":
        draft.values.pop("train.mixed_precision")
    finish(draft)
    return draft


def code_of(file: Path) -> list[str]:
    """Return the code cells of a notebook without magics, or a script as one cell.

    Raises:
        ValueError: The file does not exist or is not a notebook.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None
    if file.suffix != ".ipynb":
        return [text]
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell.get("cell_type") == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a notebook: {error!r}") from None
    return ["\n".join(_plain(line) for line in source.splitlines()) for source in sources]


def _plain(line: str) -> str:
    """Return a line of a cell, without shell commands and magics."""
    stripped = line.lstrip()
    indent = line[: len(line) - len(stripped)]
    return f"{indent}pass" if stripped.startswith(("!", "%")) else line


def _data(draft: Draft) -> None:
    path = draft.source.get("load_dataset.path")
    if path is None or isinstance(path, Expression):
        draft.values["load.sources"] = [{"path": "data/train.jsonl"}]
        draft.hints.append("the notebook's data set is not a constant; state it in load.sources")
        return
    path, files = str(path), draft.source.get("load_dataset.data_files")
    source: dict[str, Any] = {"path": path, "hub": True}
    if path in ("json", "csv", "parquet") and files is not None and not isinstance(files, Expression):
        names = list(files.values()) if isinstance(files, dict) else [files]
        first = names[0][0] if isinstance(names[0], list) else names[0]
        source = {"path": str(first) if "://" in str(first) else local_path(str(first))}
    elif is_local(path):
        source = {"path": local_path(path)}
    if source.get("hub"):
        name, split = draft.source.get("load_dataset.name"), draft.source.get("load_dataset.split")
        source |= {"config": str(name)} if isinstance(name, str) and not isinstance(name, Expression) else {}
        source |= {"split": str(split)} if isinstance(split, str) and not isinstance(split, Expression) else {}
        source |= {"streaming": True} if draft.source.get("load_dataset.streaming") is True else {}
    draft.values["load.sources"] = [source]
    draft.hints.append(
        "functions of the notebook that rewrite rows are not read; see template and columns in docs/data.md"
    )


def _dtype(draft: Draft, key: str, value: Any) -> None:
    name = str(value).rpartition(".")[2]
    if name in ("bfloat16", "float16", "float32"):
        draft.same(key, value, model__dtype=name)
    else:
        draft.same(key, value, "bfloat16", model__dtype="bfloat16")


def _precision(draft: Draft, key: str, value: Any) -> None:
    """`fp16 = not is_bfloat16_supported()` and the like are bf16 on present GPUs."""
    if isinstance(value, Expression):
        if key.endswith(".bf16"):
            draft.same(key, value, "as on a GPU with bfloat16", train__mixed_precision="bf16")
        else:
            draft.same(key, value, "off on a GPU with bfloat16")
    elif is_on(value):
        kind = key.rpartition(".")[2]
        extra: dict[str, Any] = {"train__on_bad_loss": None} if kind == "fp16" else {}
        draft.same(key, value, train__mixed_precision=kind, **extra)
    else:
        draft.same(key, value, "off")


def _targets(draft: Draft, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value)
    draft.same(key, value, train__lora_target_modules="all-linear" if names == ["all-linear"] else names)


def _gradient(draft: Draft, key: str, value: Any) -> None:
    note = "activations are computed again; unsloth also keeps some in the host's memory" if value == "unsloth" else ""
    draft.same(key, value, note, train__gradient_checkpointing=is_on(value))


def _chat_template(draft: Draft, key: str, value: Any) -> None:
    ours = {"chatml": "chatml", "llama-3": "llama3", "llama3": "llama3", "zephyr": "zephyr", "gemma": "gemma"}
    name = str(value)
    own = {"llama-3": "llama-3", "gemma": "gemma", "mistral": "mistral", "qwen": "qwen", "phi": "phi"}
    model = str(draft.source.get("from_pretrained.model_name", "")).lower()
    if any(name.startswith(start) and mark in model for start, mark in own.items()) and "base" not in model:
        draft.same(key, value, "the model's own", format__chat_template=None)
    elif name in ours:
        draft.same(key, value, format__chat_template=ours[name])
    else:
        draft.nearest(key, value, "the model's own template", format__chat_template=None)


def _vision_part(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.same(key, value, "all linear layers")
        return
    modules = {
        "finetune_vision_layers": ["visual", "vision_tower", "vision_model"],
        "finetune_attention_modules": ["self_attn", "attn"],
        "finetune_mlp_modules": ["mlp"],
    }
    part = key.rpartition(".")[2]
    if part in modules:
        known = draft.values.get("train.exclude_modules") or []
        draft.same(key, value, train__exclude_modules=[*known, *modules[part]])
    else:
        draft.unsupported(key, value, "the language model is adapted; state train.lora_target_modules")


_SPEED = "a matter of speed or memory"

_OWN: dict[str, Rule] = {
    "from_pretrained.model_name": keep("model.name_or_path", str),
    "from_pretrained.max_seq_length": keep("pack.max_length", whole),
    "from_pretrained.dtype": _dtype,
    "from_pretrained.load_in_4bit": ignore("with get_peft_model: method qlora or lora"),
    "from_pretrained.load_in_8bit": approach("the base is in 16 bits"),
    "from_pretrained.load_in_16bit": ignore("model.dtype"),
    "from_pretrained.full_finetuning": ignore("method: full or an adapter"),
    "from_pretrained.token": ignore("state it in the environment variable HF_TOKEN"),
    "from_pretrained.revision": keep("model.revision", str),
    "from_pretrained.trust_remote_code": keep("model.trust_remote_code", is_on),
    "from_pretrained.use_gradient_checkpointing": _gradient,
    "from_pretrained.rope_scaling": refuse("positions are those of the base model's config.json"),
    "from_pretrained.attn_implementation": keep("model.attn_implementation", str),
    **{
        f"from_pretrained.{name}": ignore(_SPEED)
        for name in (
            "device_map",
            "fix_tokenizer",
            "use_exact_model_name",
            "fast_inference",
            "gpu_memory_utilization",
            "float8_kv_cache",
            "random_state",
            "max_lora_rank",
            "disable_log_stats",
            "resize_model_vocab",
            "offload_embedding",
            "unsloth_tiled_mlp",
            "qat_scheme",
            "return_logits",
            "fullgraph",
        )
    },
    "get_peft_model.model": ignore("the model that was loaded"),
    "get_peft_model.r": keep("train.lora_r", whole),
    "get_peft_model.lora_alpha": keep("train.lora_alpha", whole),
    "get_peft_model.lora_dropout": keep("train.lora_dropout", number),
    "get_peft_model.target_modules": _targets,
    "get_peft_model.target_parameters": keep("train.lora_target_parameters", list),
    "get_peft_model.bias": refuse("biases are not trained", off=("none",)),
    "get_peft_model.use_gradient_checkpointing": _gradient,
    "get_peft_model.random_state": ignore("train.seed"),
    "get_peft_model.use_rslora": keep("train.use_rslora", is_on),
    "get_peft_model.use_dora": keep("train.use_dora", is_on),
    "get_peft_model.loftq_config": refuse("state train.init_lora_weights: loftq"),
    "get_peft_model.init_lora_weights": keep("train.init_lora_weights"),
    "get_peft_model.modules_to_save": keep("train.modules_to_save", list),
    "get_peft_model.layers_to_transform": keep("train.layers_to_transform", list),
    "get_peft_model.max_seq_length": ignore("pack.max_length"),
    "get_peft_model.task_type": ignore("language models"),
    "get_peft_model.ensure_weight_tying": ignore("tied embeddings stay tied"),
    "get_peft_model.temporary_location": ignore(_SPEED),
    **{
        f"get_peft_model.{name}": _vision_part
        for name in (
            "finetune_vision_layers",
            "finetune_language_layers",
            "finetune_attention_modules",
            "finetune_mlp_modules",
        )
    },
    "get_chat_template.tokenizer": ignore("the tokenizer that was loaded"),
    "get_chat_template.chat_template": _chat_template,
    "get_chat_template.mapping": ignore("keys of messages are found by their names"),
    "get_chat_template.map_eos_token": ignore("the token that ends a turn ends generation"),
    "get_chat_template.system_message": keep("format.system_message", str),
    "load_dataset.path": ignore("load.sources[].path"),
    "load_dataset.name": ignore("load.sources[].config"),
    "load_dataset.split": ignore("load.sources[].split"),
    "load_dataset.data_files": ignore("load.sources[].path"),
    "load_dataset.streaming": ignore("load.sources[].streaming"),
    "load_dataset.token": ignore("state it in the environment variable HF_TOKEN"),
    "train_on_responses_only.trainer": ignore("the trainer"),
    "train_on_responses_only.instruction_part": lambda draft, key, value: draft.same(
        key, value, "turns are found by rendering", format__train_on="assistant"
    ),
    "train_on_responses_only.response_part": lambda draft, key, value: draft.same(
        key, value, "turns are found by rendering", format__train_on="assistant"
    ),
    "train_on_responses_only.last_response_only": lambda draft, key, value: draft.same(
        key, value, format__train_on="last_assistant" if is_on(value) else "assistant"
    ),
    "train_on_responses_only.num_proc": ignore("it does not change the rows"),
    "train_on_responses_only.force_match": ignore("turns are found by rendering"),
    **{
        f"trainer.{name}": ignore("an object of the notebook")
        for name in (
            "model",
            "tokenizer",
            "processing_class",
            "train_dataset",
            "eval_dataset",
            "args",
            "data_collator",
            "callbacks",
            "formatting_func",
            "compute_metrics",
            "preprocess_logits_for_metrics",
        )
    },
    "save_pretrained_gguf.path": ignore("outs/quantize"),
    "save_pretrained_gguf.tokenizer": ignore("the tokenizer is saved, too"),
    "push_to_hub_gguf.path": approach("state publish.push_to_hub: OWNER/NAME"),
    "push_to_hub_gguf.tokenizer": ignore("the tokenizer is saved, too"),
    "push_to_hub_gguf.token": ignore("state it in the environment variable HF_TOKEN"),
    "save_pretrained_gguf.quantization_method": lambda draft, key, value: _gguf(draft, key, value),
    "push_to_hub_gguf.quantization_method": lambda draft, key, value: _gguf(draft, key, value),
}


def _gguf(draft: Draft, key: str, value: Any) -> None:
    if value in ("q8_0", "f16"):
        draft.same(key, value, quantize__export_gguf=str(value))
    else:
        draft.nearest(key, value, "q8_0; llama.cpp quantizes it further", quantize__export_gguf="q8_0")


def _rules(source: Any) -> dict[str, Rule]:
    """Return the rule of each argument; those of TrainingArguments and SFTTrainer are trl's."""
    rules = dict(_OWN)
    for key in source:
        call, _, name = key.partition(".")
        if key in rules or call not in ("args", "trainer") or name not in trl.RULES:
            continue
        if name in ("bf16", "fp16"):
            rules[key] = _precision
        else:
            rules[key] = _under_own_name(name)
    return rules


def _under_own_name(name: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if isinstance(value, Expression):
            draft.nearest(key, value, f"{UNKNOWN}; the default")
            return
        call = key.partition(".")[0]
        plain = {other.partition(".")[2]: item for other, item in draft.source.items() if other.startswith(f"{call}.")}
        inner = Draft(draft.peer, plain, draft.processes, draft.values, draft.defaults, [], draft.files, draft.hints)
        trl.RULES[name](inner, name, value)
        draft.rows += [type(row)(f"{call}.{row.key}", *_rest(row)) for row in inner.rows]

    return rule


def _rest(row: Any) -> tuple[Any, ...]:
    return row.value, row.effect, row.written, row.note
