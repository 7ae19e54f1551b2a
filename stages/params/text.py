"""The text of a params.yaml: values with the descriptions of the schema as comments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from stages.params.schema import Params

NEUTRAL = Path(__file__).with_name("neutral.yaml")
COLUMN, WIDTH = 40, 120
HEAD = """# Every value of the pipeline: one section per stage, and `model`, which several stages read.
# Change a value and type `sft repro`: only the stages that depend on it run again.
"""
PLAIN = re.compile(r"[A-Za-z_/][\w./+ -]*")
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
"""Words that YAML does not read as text."""


def neutral_values() -> dict[str, Any]:
    """Return the values from which a params.yaml starts that is made of another file: no quantization, no gate."""
    values: dict[str, Any] = YAML(typ="safe", pure=True).load(NEUTRAL.read_text(encoding="utf-8"))
    return values


def overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with others in their place; a section in the changes replaces only the keys that it has."""
    result = dict(values)
    for key, value in changes.items():
        within = result.get(key)
        both = isinstance(value, Mapping) and isinstance(within, Mapping) and key not in WHOLE
        result[key] = overlay(within, value) if both else value  # type: ignore[arg-type]
    return result


WHOLE = (
    "adapter",
    "arguments",
    "chat_template_kwargs",
    "lr_scheduler_kwargs",
    "max_fractions",
    "optim_args",
    "rank_pattern",
    "alpha_pattern",
)
"""Keys whose value is a mapping of the user's, which is replaced as a whole."""


def params_text(values: Mapping[str, Any], head: str = HEAD) -> str:
    """Return the text of a params.yaml, in the order of the schema and with a comment per key.

    Args:
        values: All sections.
        head: Comment lines at its beginning.
    """
    lines: list[str] = head.splitlines()
    for name, section in values.items():
        lines.append("")
        kind = Params.model_fields[name].annotation
        assert isinstance(kind, type)
        lines += _entry(name, section, 0, kind.__doc__ or "", kind)
    return "\n".join(lines) + "\n"


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, alone, in a list, or beside null."""
    parts = [annotation, *get_args(annotation)]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _entry(name: str, value: Any, depth: int, comment: str, section: type[BaseModel] | None) -> list[str]:
    """Return the lines of a key."""
    indent = "  " * depth
    if isinstance(value, Mapping) and value and section is not None:
        lines = list(_commented(f"{indent}{name}:", comment))
        for key, item in value.items():
            field = section.model_fields[key]
            lines += _entry(key, item, depth + 1, field.description or "", _section(field.annotation))
        return lines
    if isinstance(value, list) and value and section is not None:
        lines = list(_commented(f"{indent}{name}:", comment))
        for item in value:
            rows = [
                row
                for key, part in item.items()
                for row in _entry(
                    key,
                    part,
                    depth + 2,
                    section.model_fields[key].description or "",
                    _section(section.model_fields[key].annotation),
                )
            ]
            rows[0] = f"{indent}  - {rows[0].lstrip()}" if not rows[0].endswith(":") else rows[0]
            lines += _realigned(rows)
        return lines
    if isinstance(value, list) and any(isinstance(item, str) and len(item) > 20 for item in value):
        items = [f"{indent}  - {_scalar(item)}" for item in value]
        return [*_commented(f"{indent}{name}:", comment), *items]
    return list(_commented(f"{indent}{name}: {_flow(value)}", comment))


def entry_lines(name: str, value: Any, depth: int, field: FieldInfo) -> list[str]:
    """Return the lines of a key and its comment, indented for its depth.

    Args:
        name: The key, without its section.
        value: Its value.
        depth: Number of sections that it lies in.
        field: The field of the schema.
    """
    section = _section(field.annotation)
    comment = field.description or (section.__doc__ if section is not None else "") or ""
    return _entry(name, value, depth, comment, section)


def _realigned(rows: list[str]) -> list[str]:
    text, mark, comment = rows[0].partition("  # ")
    return [f"{text.rstrip():<{COLUMN}}{mark.strip()} {comment}".rstrip() if mark else rows[0], *rows[1:]]


def _commented(text: str, comment: str) -> Iterator[str]:
    """Yield a line with its comment in the column of comments, and the rest of the comment below it."""
    lines = textwrap.wrap(comment, WIDTH - COLUMN - 2, break_long_words=False, break_on_hyphens=False)
    if not lines:
        yield text
        return
    first = text.ljust(COLUMN) if len(text) < COLUMN - 1 else f"{text}  "
    yield f"{first}# {lines[0]}"
    yield from (f"{'':{COLUMN}}# {line}" for line in lines[1:])


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    """Return a value as both YAML 1.1 and YAML 1.2 read it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        text = repr(value)
        return re.sub(r"^(-?\d+)e", r"\1.0e", text) if "e" in text else text
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if PLAIN.fullmatch(text) and text == text.strip() and text.lower() not in WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)
