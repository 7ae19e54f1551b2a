"""Data sets, templates and lengths of a LLaMA-Factory configuration as sources and formats.

Source: `llamafactory/data/parser.py` and `converter.py` (0.9.5), and dataset_info.json's documentation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.importing.draft import Draft, hold_out, is_on
from stages.importing.formats import FORMATS, jinja
from stages.importing.places import TEMPLATE_FILE, local_path
from stages.importing.trainer import whole

ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
KNOWN_ROLES = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}

SENTENCEPIECE = (
    "llama2",
    "llama2_zh",
    "mistral",
    "vicuna",
    "llava",
    "solar",
    "breeze",
    "openchat",
    "yi_vl",
    "xuanyuan",
)
"""Templates for which prompt and answer, tokenized apart, begin with a space that the text does not have."""


def names_of(value: Any) -> list[str]:
    """Return names of data sets, which are a list or separated by commas."""
    parts = value.split(",") if isinstance(value, str) else [str(item) for item in value]
    return [part.strip() for part in parts if part.strip()]


def read_infos(draft: Draft, file: Path, info: Path | None) -> dict[str, Any]:
    """Read dataset_info.json: as stated, or in `dataset_dir`, from the configuration's folder or this one.

    Raises:
        ValueError: The stated file can't be read.
    """
    folder = draft.get("dataset_dir", default="data")
    if isinstance(folder, dict):
        return folder
    places = [info] if info else [base / str(folder) / "dataset_info.json" for base in (Path(), file.parent)]
    places += [] if info else [file.parent / "dataset_info.json"]
    for place in places:
        if place is None or not place.is_file():
            continue
        try:
            values = json.loads(place.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{place}: a mapping of data sets by their names is needed")
        return values
    if info is not None:
        raise ValueError(f"{info}: no such file")
    return {}


def dataset_names(draft: Draft, key: str, value: Any, infos: Mapping[str, Any]) -> None:
    """Turn data sets by name into sources, as dataset_info.json describes them."""
    names = names_of(value)
    if not names:
        draft.same(key, value, "none")
        return
    limit = draft.get("max_samples")
    sources: list[dict[str, Any]] = []
    missing = []
    for name in names:
        info = infos.get(name)
        if not isinstance(info, Mapping):
            missing.append(name)
            sources.append({"path": f"data/{name}.json"})
            continue
        sources.append(_source(draft, f"{key}.{name}", info))
    for source in sources:
        if limit:
            source["max_rows"] = min(whole(limit), source.get("max_rows", whole(limit)))
    draft.values["load.sources"] = [*draft.values.get("load.sources", []), *sources]
    for source, share in zip(sources, probabilities(draft), strict=False):
        source["share"] = share
    is_online = bool(missing) and draft.source.get("dataset_dir") == "ONLINE"
    for source, name in zip(sources, names, strict=True):
        source |= {"path": name, "hub": True} if is_online else {}
        source |= {"streaming": True} if source.get("hub") and draft.is_on("streaming") else {}
    if is_online:
        draft.same(key, value, "data sets of the hub")
    elif missing:
        draft.nearest(
            key, value, f"no entry for {', '.join(missing)}: state --dataset-info dataset_info.json, or the file"
        )
    else:
        draft.same(key, value, "load.sources")


def eval_names(draft: Draft, key: str, value: Any, infos: Mapping[str, Any]) -> None:
    """Turn the data set of held-out rows into `load.eval`, if it is a file."""
    first, *others = names_of(value)
    apart = Draft(draft.peer, draft.source)
    source = _source(apart, key, infos.get(first) or {"file_name": f"{first}.json"})
    if source.get("hub"):
        part = {"path": None, "fraction": 0.05, "count": None}
        note = "download it to a file in data/ and state load.eval.path; until then, 5 % of the rows"
        draft.nearest(key, value, note, load__eval=part)
        return
    kept: dict[str, Any] = {
        name: source[name] for name in ("columns", "roles", "message_keys", "template") if name in source
    }
    held: dict[str, Any] = {"path": source["path"], "fraction": None, "count": None, **kept}
    if others:
        draft.nearest(key, value, f"held-out rows are one file; join {', '.join(others)} to it", load__eval=held)
    else:
        draft.same(key, value, "load.eval", load__eval=held)
    draft.hints += apart.hints


def _source(draft: Draft, place: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source of an entry of dataset_info.json, and record what became of keys that have no equal."""
    source: dict[str, Any] = {}
    if info.get("hf_hub_url"):
        source |= {"path": str(info["hf_hub_url"]), "hub": True}
        source |= {"config": str(info["subset"])} if info.get("subset") else {}
        source |= {"split": str(info["split"])} if info.get("split") else {}
    elif info.get("cloud_file_name"):
        source["path"] = str(info["cloud_file_name"])
    else:
        named = info.get("file_name") or info.get("script_url") or info.get("ms_hub_url") or info.get("om_hub_url")
        source["path"] = local_path(f"data/{named}" if info.get("file_name") else str(named))
        if not info.get("file_name"):
            draft.unsupported(place, named, "data comes from files, URLs or the Hugging Face hub; download it to data/")
        else:
            draft.hints.append(f"copy {named} to {source['path']}, where DVC sees its changes")
    if info.get("num_samples"):
        source["max_rows"] = whole(info["num_samples"])
    if info.get("ranking"):
        draft.nearest(place, info, "the better answer is trained")
        chosen = (info.get("columns") or {}).get("chosen", "chosen")
        source["columns"] = {str(chosen): "completion"}
        return source
    columns = dict(info.get("columns") or {})
    if info.get("formatting", "alpaca") == "alpaca":
        _alpaca(source, columns, has_columns="columns" in info)
    else:
        _conversations(source, columns, dict(info.get("tags") or {}), with_tags="tags" in info)
    if any(columns.get(name) for name in ("images", "videos", "audios")):
        draft.values["pack.strategy"] = "none"
        draft.values["has images"] = True
    for name in ("videos", "audios"):
        if columns.get(name):
            draft.nearest(f"{place}.columns.{name}", columns[name], "rows with videos or audio are dropped")
    if columns.get("images") and columns["images"] not in ("images", "image"):
        source.setdefault("columns", {})[columns["images"]] = "images"
    if columns.get("tools") or (info.get("tags") or {}).get("function_tag"):
        draft.values["has tools"] = True
    return source


def _alpaca(source: dict[str, Any], columns: dict[str, Any], *, has_columns: bool) -> None:
    """Fill in the template of instruction, input and output; with a history, their columns."""
    names = {key: columns.get(key) if has_columns else default for key, default in ALPACA_COLUMNS.items()}
    if columns.get("history") or columns.get("tools") or columns.get("images"):
        mapped = {names["prompt"]: "instruction", names["query"]: "input", names["response"]: "output"}
        mapped |= {columns.get(name): name for name in ("system", "history", "tools") if columns.get(name)}
        source["columns"] = {str(old): new for old, new in mapped.items() if old and old != new}
        return
    asked = [name for name in (names["prompt"], names["query"]) if name]
    if len(asked) == 2:
        first, second = asked
        user = (
            f"{{{{ {first} if {first} else '' }}}}{{% if {second} is defined and {second} %}}"
            f"{{% if {first} %}}{{{{ '\\n' }}}}{{% endif %}}{{{{ {second} }}}}{{% endif %}}"
        )
    else:
        user = f"{{{{ {asked[0]} }}}}" if asked else ""
    source["template"] = {"user": user, "assistant": f"{{{{ {names['response'] or 'output'} }}}}"}
    if columns.get("system"):
        source["template"]["system"] = f"{{{{ {columns['system']} or '' }}}}"


def _conversations(source: dict[str, Any], columns: dict[str, Any], tags: dict[str, Any], *, with_tags: bool) -> None:
    messages = columns.get("messages") or "conversations"
    mapped = {}
    if messages not in ("messages", "conversations", "conversation"):
        mapped[messages] = "messages"
    for name in ("system", "tools"):
        if columns.get(name) and columns[name] != name:
            mapped[columns[name]] = name
    if mapped:
        source["columns"] = mapped
    keys = {}
    if tags.get("role_tag") and tags["role_tag"] not in ("role", "from", "author"):
        keys[tags["role_tag"]] = "role"
    if tags.get("content_tag") and tags["content_tag"] not in ("content", "value", "text"):
        keys[tags["content_tag"]] = "content"
    if keys:
        source["message_keys"] = keys
    roles = {
        str(tags[name]): role
        for name, role in ROLES.items()
        if tags.get(name) and str(tags[name]).lower() not in KNOWN_ROLES[name]
    }
    if roles:
        source["roles"] = roles


def template(draft: Draft, key: str, value: Any) -> None:
    """Write the template of this name to data/, or take the model's own where only that knows tools and images."""
    name = str(value)
    form = FORMATS.get(f"llamafactory:{name}")
    if form is None:
        draft.nearest(key, value, "not a template that is known here; the model's own", format__chat_template=None)
        return
    thinks = str(draft.source.get("enable_thinking", True)).lower() != "false"
    _system_of(draft, form)
    draft.files[TEMPLATE_FILE] = jinja(form, marks=True, thinks=thinks)
    note = "the same tokens and labels"
    if name in SENTENCEPIECE:
        draft.nearest(
            key,
            value,
            "the same text; prompt and answer are tokenized together, which may give another first token",
            format__chat_template=TEMPLATE_FILE,
        )
    elif form.get("ends_once"):
        draft.nearest(
            key,
            value,
            "each answer ends with the end-of-sequence token, and not the last one alone",
            format__chat_template=TEMPLATE_FILE,
        )
    else:
        draft.same(key, value, note, format__chat_template=TEMPLATE_FILE)


def own_template(draft: Draft) -> None:
    """Take the model's own template where rows have tools or images, which templates of text do not print."""
    what = "images" if draft.values.pop("has images", False) else ""
    what = "tools" if draft.values.pop("has tools", False) else what
    if not what or draft.values.get("format.chat_template") != TEMPLATE_FILE:
        return
    draft.files.pop(TEMPLATE_FILE, None)
    draft.values["format.chat_template"] = None
    place = next(index for index, row in enumerate(draft.rows) if row.key == "template")
    row = draft.rows[place]
    note = f"the model's own template, which prints {what}; what follows the token that ends a turn is not trained"
    draft.rows.pop(place)
    draft.nearest(row.key, row.value, note, format__chat_template=None)
    draft.rows.insert(place, draft.rows.pop())


def _system_of(draft: Draft, form: Mapping[str, Any]) -> None:
    if "default_system" in form and draft.get("default_system") is None:
        if form["default_system"] is None:
            draft.hints.append("the template's system message is left out; state it in format.system_message")
        else:
            draft.values["format.system_message"] = form["default_system"]


def default_system(draft: Draft, key: str, value: Any) -> None:
    """The system message of conversations that have none."""
    draft.same(key, value, format__system_message=str(value) or None)


def cutoff(draft: Draft, key: str, value: Any) -> None:
    """The length limit."""
    if draft.is_on("packing", "neat_packing"):
        draft.same(key, value, "longer rows are dropped", pack__max_length=whole(value), pack__overflow="drop")
    else:
        draft.same(
            key,
            value,
            "prompt and answer of longer rows are cut at the end, and not each in proportion",
            pack__max_length=whole(value),
        )


MIXTURES = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}
"""Name of a mixture -> its strategy."""


def mixture(draft: Draft, key: str, value: Any) -> None:
    """How the rows of several data sets are mixed."""
    names = names_of(draft.source.get("dataset"))
    if value not in MIXTURES or len(names) < 2:
        draft.same(key, value, "all rows of all sources", load__interleave={"strategy": "concat", "seed": 0})
        return
    interleave = {"strategy": MIXTURES[value], "seed": int(draft.get("seed", default=42))}
    if draft.is_on("streaming"):
        draft.nearest(key, value, "each source is read to its end before rows are mixed", load__interleave=interleave)
    else:
        draft.same(key, value, load__interleave=interleave)


def probabilities(draft: Draft) -> list[float]:
    """Return how often each data set comes next, if they are mixed by probabilities."""
    stated = draft.get("interleave_probs")
    if stated is None or draft.get("mix_strategy") not in MIXTURES:
        return []
    return [float(part) for part in (stated.split(",") if isinstance(stated, str) else stated)]


def packing(draft: Draft, key: str, value: Any) -> None:
    """Several documents in a row."""
    if key == "packing" and not is_on(value) and draft.is_on("neat_packing"):
        draft.same(key, value, "neat_packing goes first")
    elif not is_on(value):
        strategy = _strategy(draft) if draft.is_on("packing", "neat_packing") else "none"
        draft.same(key, value, "off", pack__strategy=strategy)
    elif key == "neat_packing" or draft.is_on("neat_packing"):
        draft.same(key, value, "documents of a row do not see each other", pack__strategy=_strategy(draft))
    else:
        draft.nearest(key, value, "documents of a row do not see each other", pack__strategy=_strategy(draft))


def _strategy(draft: Draft) -> str:
    return "in_order" if draft.is_on("disable_shuffling") else "bfd"


def held_out(draft: Draft, key: str, value: Any) -> None:
    """Held-out rows as a fraction or a number."""
    size = float(value)
    if draft.get("eval_dataset"):
        draft.irrelevant(key, value, "eval_dataset goes first")
    else:
        hold_out(draft, key, value, size)
