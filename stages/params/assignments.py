"""Values of `--set section.key=value`, typed by the schema, and how they replace those of params.yaml."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError

from sft.folders import partial_file
from stages.params.places import find_lines, find_value, line_of
from stages.params.schema import Params, ParamsError, check_params, load_params, model_at


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse `section.key=value` texts to nested values.

    A value is YAML. Where a key takes text but no numbers, `1234` is text. `load.sources[0].path` and
    `load.sources.0.path` name an entry of a list.

    Raises:
        ParamsError: A text has no `=`, its value is not YAML, or its key lies in another one that was set.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        *parents, last = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
        if not separator or not last:
            raise ParamsError(f"--set {assignment}: expected section.key=value, such as train.learning_rate=3e-4")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ParamsError(f"--set {assignment}: {parent} was already set to a value")
        try:
            value = round_trip().load(text)
        except (YAMLError, ValueError):
            raise ParamsError(f"--set {assignment}: {text!r} is not a YAML value; put quotes around text") from None
        target[last] = text.strip() if _must_be_text([*parents, last], value) else value
    return values


def _must_be_text(parts: list[str], value: Any) -> bool:
    """Return whether a key takes text and not the number, date or truth value that YAML makes of an unquoted word."""
    if value is None or isinstance(value, (str, list, dict)):
        return False
    section = model_at(Params, tuple(int(part) if part.isdecimal() else part for part in parts[:-1]))
    field = section.model_fields.get(parts[-1]) if section else None
    if field is None:
        return False
    kinds = _kinds(field.annotation)
    return str in kinds and not any(isinstance(value, kind) for kind in kinds)


def _kinds(annotation: Any) -> set[type]:
    """Return the classes of the values that a type allows."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    kind = get_origin(annotation) or annotation
    return {kind} if isinstance(kind, type) else set()


def apply_overrides(params_text: str, values: dict[str, Any], source: str = "params.yaml with overrides") -> str:
    """Replace values in the text of params.yaml, keep its comments and order, and check the result.

    Args:
        params_text: Content of params.yaml.
        values: Nested values; a section in them replaces only the keys that it has.
        source: Name of the result in messages.

    Raises:
        ParamsError: The resulting params.yaml is not valid.
    """
    yaml = round_trip()
    document = yaml.load(params_text)
    _merge(document, values, source, "")
    written = io.StringIO()
    yaml.dump(document, written)
    text = written.getvalue()
    result = YAML(typ="safe", pure=True).load(text)
    check_params(result, source=source)
    edited = _edit_lines(params_text, values)
    return edited if means(edited, result) else text


def _edit_lines(text: str, values: dict[str, Any]) -> str:
    """Replace values in place, so that all other lines stay as they are, however the file is indented.

    Only values of one line are replaced; the caller compares the result with the values that it wants.
    """
    ends = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    changes = []
    for name, value in flat_values(values).items():
        node = find_value(text, re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name))
        if node is None or node[0][0] != node[1][0] or (isinstance(value, (dict, list)) and value):
            continue
        dumped = io.StringIO()
        yaml = round_trip()
        yaml.dump({"value": value}, dumped)
        (line, start), (_, end) = node
        new = dumped.getvalue().removeprefix("value:").strip()
        if start == end:  # an empty value, which is null, follows the colon at once
            new = f" {new}"
        changes.append((ends[line] + start, ends[line] + end, new))
    for start, end, new in sorted(changes, reverse=True):
        rest, newline, after = text[end:].partition("\n")
        # the comment stays in its column
        comment = rest.lstrip(" ")
        if comment.startswith("#"):
            rest = " " * max(1, end - start + len(rest) - len(comment) - len(new)) + comment
        text = text[:start] + new + rest + newline + after
    return text


def means(text: str, values: Any) -> bool:
    """Return whether a YAML text has these values."""
    try:
        return bool(YAML(typ="safe", pure=True).load(text) == values)
    except (YAMLError, ValueError):
        return False


def load_with_assignments(path: Path, assignments: Iterable[str]) -> Params:
    """Read params.yaml with other values, without writing anything.

    Raises:
        ParamsError: The file or an assignment is not valid.
    """
    params = load_params(path)
    values = parse_assignments(assignments)
    if not values:
        return params
    return check_params(YAML(typ="safe", pure=True).load(_with(path, values)), source=_SOURCE)


def write_assignments(path: Path, assignments: Iterable[str]) -> list[str]:
    """Write other values into params.yaml; keep its comments and all other lines.

    Returns:
        For each changed line, its place and its value before and after.

    Raises:
        ParamsError: The file or an assignment is not valid; then nothing is written.
    """
    load_params(path)
    values = parse_assignments(assignments)
    before = path.read_text(encoding="utf-8")
    after = _with(path, values)
    if after == before:
        return []
    with partial_file(path) as partial:
        partial.write_text(after, encoding="utf-8")
    old, new = (YAML(typ="safe", pure=True).load(content) for content in (before, after))
    lines = find_lines(after)
    keys = [re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name) for name in assigned(values)]
    changed = [(key, _value_at(old, key), _value_at(new, key)) for key in keys]
    return [
        f"{path.name}:{line_of(key, lines)}: {key}: {_shown(was)} -> {_shown(now)}"
        for key, was, now in changed
        if was != now
    ]


def assigned(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Return the values of `parse_assignments` by dotted name; a key set to a section or a list is one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{place}.{key}".lstrip(".")
        found |= assigned(value, name) if type(value) is dict else {name: value}
    return found


def _value_at(values: Any, key: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", key):
        try:
            values = values[int(part) if isinstance(values, list) else part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


_SOURCE = "params.yaml with --set"


def _with(path: Path, values: dict[str, Any]) -> str:
    return apply_overrides(path.read_text(encoding="utf-8"), values, source=_SOURCE)


def round_trip() -> YAML:
    """Return a YAML reader and writer that keeps comments, quotes, order and indentation of params.yaml."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _represent_null)
    return yaml


def _represent_null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _merge(document: Any, values: dict[str, Any], source: str, place: str) -> None:
    for key, value in values.items():
        index: Any = key
        if isinstance(document, CommentedSeq):
            if not key.isdecimal() or int(key) >= len(document):
                raise ParamsError(f"{source}: {place}[{key}]: the list has {len(document)} entries, from 0")
            index = int(key)
        here = f"{place}[{key}]" if isinstance(document, CommentedSeq) else f"{place}.{key}".lstrip(".")
        within = document[index] if isinstance(document, CommentedSeq) else document.get(index)
        if isinstance(value, dict) and isinstance(within, (dict, CommentedSeq)):
            _merge(within, value, source, here)
        else:
            document[index] = value


def flat_values(values: Any, place: str = "") -> dict[str, Any]:
    """Return nested values by their names, such as `load.sources[0].path`."""
    if isinstance(values, dict) and values:
        items = [(f"{place}.{key}".lstrip("."), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        items = [(f"{place}[{number}]", value) for number, value in enumerate(values)]
    else:
        return {place: values}
    return {name: leaf for key, value in items for name, leaf in flat_values(value, key).items()}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
