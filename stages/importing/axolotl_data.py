"""Data sets, held-out rows, chat template and tokens of an Axolotl configuration as sources and formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from sft.data.messages import ROLE_KEYS, ROLES, TEXT_KEYS, TRAIN_KEYS
from sft.data.records import CONVERSATION_COLUMNS
from stages.importing.draft import Draft, hold_out, is_on
from stages.importing.formats import FORMATS, TYPES, Prompt, jinja, pair, user_defined
from stages.importing.places import FORMATS_OF_FILES, TEMPLATE_FILE, is_local, local_path

NOT_SFT = ("bradley_terry", "stepwise_supervised", "_synthetic", "ebft", "dpo", "kto", "orpo")


def dataset_list(draft: Draft, key: str, value: Any) -> None:
    """Turn data sets into sources, with a row for each of their keys."""
    entries = value if isinstance(value, list) else [value]
    sources = []
    for index, entry in enumerate(entries):
        place = f"{key}[{index}]" if isinstance(value, list) else key
        if isinstance(entry, str):
            entry = {"path": entry}
        if key == "pretraining_dataset":
            entry = {"type": "pretrain", **entry}
        sources += _sources(draft, place, entry)
    if draft.is_on("streaming"):
        sources = [{**source, "streaming": True} if source.get("hub") else source for source in sources]
    draft.values["load.sources"] = [*draft.values.get("load.sources", []), *sources]


def _sources(draft: Draft, place: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sources of a data set, and record what became of its keys."""
    source: dict[str, Any] = {}
    for name, item in entry.items():
        known = name in RULES
        if item is None and name != "type":
            draft.same(f"{place}.{name}", item, "not set")
        elif known:
            RULES[name](draft, f"{place}.{name}", item, entry, source)
        else:
            draft.unsupported(f"{place}.{name}", item, "not an option of a data set of Axolotl that is known here")
    if "type" not in entry:
        _type(draft, "", None, entry, source)
    files = source.pop("files", None)
    if not files:
        return [source]
    return [{**source, "path": file} for file in files]


def _path(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    path = str(value)
    if path in FORMATS_OF_FILES:
        draft.same(key, value, "a format of files; data_files names them")
    elif "://" in path:
        source["path"] = path
        draft.same(key, value, f"load.sources[].path: {path}")
    elif is_local(path):
        source["path"] = local_path(path)
        note = "" if source["path"] == path else f"copy it to {source['path']}"
        draft.same(key, value, note)
        if note:
            draft.hints.append(f"copy {path} to {source['path']}, where DVC sees its changes")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        source["path"] = "data/train.jsonl"
        draft.nearest(key, value, "a placeholder; state the data set")
    else:
        source |= {"path": path, "hub": True}
        draft.same(key, value, "a data set of the hub")


def _files(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    names = [value] if isinstance(value, str) else list(value)
    path = str(entry.get("path"))
    if path in FORMATS_OF_FILES or is_local(path):
        source["files"] = [local_path(str(name)) for name in names]
        source.pop("hub", None)
        draft.same(key, value, f"copy to {', '.join(source['files'])}")
        draft.hints.append(f"copy {', '.join(map(str, names))} to data/, where DVC sees its changes")
        return
    revision = entry.get("revision") or "main"
    base = f"https://huggingface.co/datasets/{path}/resolve/{revision}"
    source["files"] = [f"{base}/{name}" for name in names]
    for name in ("hub", "split", "revision", "config"):
        source.pop(name, None)
    draft.same(key, value, "files of the data set by their URL")


def _split(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    if entry.get("data_files"):
        draft.same(key, value, "the whole files" if value == "train" else "data_files names the files")
        return
    if not is_local(str(entry.get("path"))):
        source["split"] = str(value)
    draft.same(key, value)


def _type(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        source["template"] = user_defined(value)
        for name, item in value.items():
            draft.same(f"{key}.{name}", item, "in the source's template")
        return
    name = str(value or "")
    base, _, style = name.partition(":")
    known = TYPES.get(base)
    if name.split(".")[0] in NOT_SFT:
        raise ValueError(f"{key}: {name!r} is not for supervised fine-tuning, which alone this pipeline does")
    if known is not None:
        source["template"] = pair(known, style or "instruct")
        draft.values["format.special_text"] = "off"
        draft.same(key, value, "as prompt and completion")
    elif base in ("chat_template", "", "sharegpt") or base.startswith(("chat_template.", "sharegpt.")):
        _note_chat(draft, key, value, base)
    elif base in ("completion", "pretrain"):
        column = str(entry.get("field") or entry.get("text_column") or "text")
        source["template"] = pair(Prompt("instruct", ("", ""), output=column))
        source["template"]["prompt"] = ""
        if base == "completion":
            draft.values["pack.overflow"] = "split"
        draft.same(key, value, "all of the text is trained, in parts of pack.max_length tokens")
    elif base == "input_output":
        source["template"] = {
            "prompt": "{% for part in segments if not part.label %}{{ part.text }}{% endfor %}",
            "completion": "{% for part in segments if part.label %}{{ part.text }}{% endfor %}",
        }
        draft.nearest(key, value, "segments that are not trained come first; the end-of-sequence token is added")
    elif base == "metharme":
        source["template"] = {"prompt": "{{ prompt }}", "completion": "{{ generation }}"}
        draft.nearest(key, value, "one end-of-sequence token instead of three")
    elif base == "reflection":
        draft.unsupported(key, value, "state the source's template with columns of your choice")
    else:
        draft.unsupported(key, value, "state the source's template (docs/data.md); code of one's own is not run")


def _note_chat(draft: Draft, key: str, value: Any, base: str) -> None:
    if not key:
        return
    if base.startswith("sharegpt."):
        draft.nearest(key, value, "conversations, in the model's own template unless chat_template names one")
    elif base == "":
        draft.same(key, value, "the form of the rows is found by their columns")
    else:
        draft.same(key, value)


def _columns(target: str) -> Any:
    def rule(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
        known = CONVERSATION_COLUMNS if target == "messages" else (target,)
        if value not in known:
            source.setdefault("columns", {})[str(value)] = target
        draft.same(key, value, "found by its name" if value in known else f"columns: {{{value}: {target}}}")

    return rule


def _message_key(target: str) -> Any:
    known = {"role": ROLE_KEYS, "content": TEXT_KEYS, "train": TRAIN_KEYS}.get(target, (target,))

    def rule(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
        if value not in known:
            source.setdefault("message_keys", {})[str(value)] = target
        draft.same(key, value, "found by its name" if value in known else f"message_keys: {{{value}: {target}}}")

    return rule


def _properties(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    for name, item in value.items():
        place = f"{key}.{name}"
        if name in ("role", "content", "tool_calls", "tool_call_id", "name"):
            _message_key(str(name))(draft, place, item, entry, source)
        elif "reason" in str(name) or "think" in str(name):
            _message_key("reasoning_content")(draft, place, item, entry, source)
        else:
            draft.nearest(place, item, "only keys of messages that OpenAI's form has are passed to the template")


def _roles(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    for role, names in value.items():
        target = {"human": "user", "gpt": "assistant"}.get(str(role), str(role))
        for name in [names] if isinstance(names, str) else names:
            if ROLES.get(str(name).lower()) != target:
                source.setdefault("roles", {})[str(name)] = target
        draft.same(f"{key}.{role}", names)


def _roles_to_train(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    roles = {ROLES.get(str(role).lower(), str(role)) for role in ([value] if isinstance(value, str) else value)}
    if roles == {"assistant"}:
        draft.same(key, value)
    elif not roles:
        draft.same(key, value, "the last answer", format__train_on="last_assistant")
    elif "user" in roles:
        draft.nearest(key, value, "the whole text is trained", format__train_on="all")
    else:
        draft.nearest(key, value, "only answers of the assistant are trained")


def _ends(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    if value in ("turn", None):
        draft.same(key, value)
    else:
        draft.nearest(key, value, "the end of each trained turn is trained")


def _template_of_set(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    if draft.source.get("chat_template") in (None, value):
        chat_template(draft, key, value, entry.get("chat_template_jinja"))
    else:
        draft.nearest(key, value, "all sources have the same chat template")


def _shards(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
    if int(value) > 1:
        source["weight"] = round(1.0 / int(value), 6)
        draft.same(key, value, "a part of the same size, chosen by load.seed")
    else:
        draft.same(key, value, "all rows")


def _simply(note: str, effect: str = "same") -> Any:
    def rule(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
        if not is_on(value) and effect != "irrelevant":
            draft.same(key, value, "off, as here")
        else:
            getattr(draft, effect)(key, value, note)

    return rule


def _put(name: str) -> Any:
    def rule(draft: Draft, key: str, value: Any, entry: Mapping[str, Any], source: dict[str, Any]) -> None:
        if entry.get("data_files") is None and not is_local(str(entry.get("path"))):
            source[name] = str(value)
        draft.same(key, value)

    return rule


RULES: dict[str, Any] = {
    "path": _path,
    "data_files": _files,
    "split": _split,
    "type": _type,
    "name": _put("config"),
    "revision": _put("revision"),
    "field": _simply("the column of the text"),
    "text_column": _simply("the column of the text"),
    "field_messages": _columns("messages"),
    "field_system": _columns("system"),
    "field_tools": _columns("tools"),
    "field_thinking": _message_key("reasoning_content"),
    "template_thinking_key": _simply("the key that the template reads is found", "irrelevant"),
    "message_field_role": _message_key("role"),
    "message_field_content": _message_key("content"),
    "message_field_training": _message_key("train"),
    "message_field_training_detail": _simply("a message is trained as a whole", "nearest"),
    "message_property_mappings": _properties,
    "roles": _roles,
    "roles_to_train": _roles_to_train,
    "train_on_eos": _ends,
    "train_on_eot": _ends,
    "chat_template": _template_of_set,
    "chat_template_jinja": _simply("read with chat_template"),
    "split_thinking": _simply("reasoning in <think> is found in the content"),
    "drop_system_message": _simply("system messages stay; remove them from the rows", "nearest"),
    "conversation": _simply("state chat_template", "nearest"),
    "input_format": _simply("the source's template has the format", "nearest"),
    "input_transform": _simply("functions of Axolotl are not run", "unsupported"),
    "shards": _shards,
    "shards_idx": _simply("the part is chosen by load.seed", "irrelevant"),
    "preprocess_shards": _simply("it does not change the rows", "irrelevant"),
    "ds_type": _simply("the format is found by the file's ending", "irrelevant"),
    "trust_remote_code": _simply("data sets have no code", "irrelevant"),
    "skip": _simply("load.sources[].max_rows takes a part of the rows", "nearest"),
    "field_human": _simply("roles are found by their names", "irrelevant"),
    "field_model": _simply("roles are found by their names", "irrelevant"),
    "logprobs_field": _simply("an option of distillation", "irrelevant"),
    "temperature": _simply("an option of distillation", "irrelevant"),
}
"""Key of a data set -> what becomes of it."""


def eval_split(draft: Draft, key: str, value: Any) -> None:
    """Held-out rows: a part of the rows, or data sets of their own."""
    if key == "val_set_size":
        size = float(value)
        if draft.get("test_datasets"):
            draft.irrelevant(key, value, "test_datasets goes first")
        else:
            hold_out(draft, key, value, size)
        return
    entries = value if isinstance(value, list) else [value]
    first, *others = entries or [{}]
    apart = Draft(draft.peer, draft.source)
    (source, *more) = _sources(apart, f"{key}[0]", first)
    rows = apart.rows
    if source.get("hub") or "://" in str(source.get("path")) or "path" not in source:
        note = "download it to a file in data/ and state load.eval.path; until then, 5 % of the rows"
        draft.nearest(f"{key}[0]", first, note, load__eval={"path": None, "fraction": 0.05, "count": None})
    else:
        kept = {name: source[name] for name in ("columns", "roles", "message_keys", "template") if name in source}
        draft.values["load.eval"] = {"path": source["path"], "fraction": None, "count": None, **kept}
        draft.rows += rows
        draft.hints += apart.hints
    for index, entry in enumerate([*others, *more], start=1):
        draft.nearest(f"{key}[{index}]", entry, "held-out rows are one file; join them")


OURS = {
    "chatml": "chatml",
    "llama3": "llama3",
    "gemma": "gemma",
    "gemma3": "gemma",
    "gemma3n": "gemma",
    "phi_35": "phi3",
    "nemotron_h": "chatml",
}
"""Template of Axolotl -> named format of this library that prints the same text."""

FAMILIES = {
    "llama3": r"llama-?3.*instruct",
    "llama3_2_vision": r"llama-?3\.2.*vision-instruct",
    "llama4": r"llama-?4.*instruct",
    "gemma": r"gemma(-2)?-\d+b-it",
    "gemma3": r"gemma-?3-.*-it",
    "gemma3n": r"gemma-?3n-.*-it",
    "gemma4": r"gemma-?4-.*",
    "gemma4_unified": r"gemma-?4-.*",
    "qwen_25": r"qwen-?2\.5.*",
    "qwen2_vl": r"qwen-?2(\.5)?-vl.*",
    "qwen3": r"qwen-?3(?![.\d]).*",
    "qwen3_5": r"qwen-?3\.[56].*",
    "mistral_v1": r"mistral-7b-instruct-v0\.1|mixtral.*instruct.*",
    "mistral_v2v3": r"mistral-7b-instruct-v0\.[23].*",
    "mistral_v3_tekken": r"mistral-nemo.*|ministral-8b.*",
    "mistral_v7_tekken": r"mistral-small.*(24|25).*|magistral.*|devstral.*",
    "pixtral": r"pixtral.*",
    "phi_3": r"phi-3-.*instruct.*",
    "phi_35": r"phi-3\.5-.*instruct.*",
    "phi_4": r"phi-4.*",
    "cohere": r".*command-r.*",
    "aya": r"aya.*",
    "command_a": r".*command-a.*",
    "command_a_rag": r".*command-a.*",
    "command_a_tool_use": r".*command-a.*",
    "deepseek_v2": r"deepseek-v2.*(chat|coder)?.*",
    "deepseek_v3": r"deepseek-(v3|r1).*",
    "exaone": r"exaone-3.*",
    "exaone4": r"exaone-4.*",
    "falcon_h1": r"falcon-h1.*",
    "nemotron_h": r".*nemotron.*",
    "jamba": r".*jamba.*",
    "llava": r"llava.*",
}
"""Template of Axolotl -> the ids of models whose own template it is."""


def chat_template(draft: Draft, key: str, value: Any, jinja_text: Any = None) -> None:
    """The chat template by its name in Axolotl, or as Jinja."""
    name = str(value)
    model = str(draft.get("base_model", default="")).rstrip("/").rpartition("/")[2].lower()
    if name == "jinja" or jinja_text:
        _jinja(draft, key, value, jinja_text or draft.get("chat_template_jinja", default=""))
        return
    fallback = name.removeprefix("tokenizer_default_fallback_")
    if name == "tokenizer_default":
        draft.same(key, value, "the model's own", format__chat_template=None)
    elif fallback != name and OURS.get(fallback):
        note = f"the model's own; state format.chat_template: {OURS[fallback]} if it has none"
        draft.same(key, value, note, format__chat_template=None)
    elif name in FAMILIES and re.fullmatch(FAMILIES[name], model):
        draft.same(key, value, "the model's own, which Axolotl's is a copy of", format__chat_template=None)
    elif name in OURS:
        draft.same(key, value, format__chat_template=OURS[name])
    elif f"axolotl:{name}" in FORMATS:
        text = jinja(FORMATS[f"axolotl:{name}"])
        draft.files[TEMPLATE_FILE] = text
        draft.same(key, value, "for chats without tools", format__chat_template=TEMPLATE_FILE)
    else:
        draft.nearest(key, value, "the model's own template; compare by `sft preview`", format__chat_template=None)


def _jinja(draft: Draft, key: str, value: Any, text: Any) -> None:
    if "{" in str(text):
        draft.files[TEMPLATE_FILE] = str(text)
        draft.same(key, value, "", format__chat_template=TEMPLATE_FILE)
    elif text:
        target = f"data/{PurePosixPath(str(text)).name}"
        draft.hints.append(f"copy {text} to {target}")
        draft.same(key, value, f"copy it to {target}", format__chat_template=target)
    else:
        draft.unsupported(key, value, "chat_template_jinja is missing")


def special_tokens(draft: Draft, key: str, value: Any) -> None:
    """Special tokens; those of the tokenizer itself need not be stated."""
    for name, item in value.items() if isinstance(value, Mapping) else ():
        place = f"{key}.{name}"
        if item is None:
            draft.same(place, item, "not set")
        elif name == "pad_token":
            draft.irrelevant(place, item, "padding is not part of the loss")
        elif name == "unk_token":
            draft.irrelevant(place, item, "the tokenizer's own")
        elif name in ("bos_token", "eos_token") and item in COMMON_TOKENS:
            draft.same(place, item, "the tokenizer's own")
        elif name == "eos_token":
            draft.same(place, item, "the token that ends a turn in the template ends generation, too")
        elif name == "bos_token":
            draft.nearest(place, item, "the tokenizer's own")
        elif name == "additional_special_tokens":
            draft.values["format.add_special_tokens"] = list(item)
            draft.same(place, item, "format.add_special_tokens")
        else:
            draft.nearest(place, item, "the tokenizer's own")


COMMON_TOKENS = (
    "<s>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<eos>",
)  # fmt: skip
"""Tokens that tokenizers have as their own first and last token; Axolotl's examples repeat them."""


def new_tokens(draft: Draft, key: str, value: Any) -> None:
    """New tokens, or in former releases the special ones by their names."""
    if isinstance(value, Mapping):
        special_tokens(draft, key, value)
    else:
        draft.same(key, value, format__add_special_tokens=[str(token) for token in value])
