"""How the rows of a source are mapped: columns, keys of messages and roles renamed, or a template filled in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sft.data.messages import IMAGE_COLUMNS, ROLE_KEYS, RowError, described
from sft.data.records import CONVERSATION_COLUMNS, OPTIONAL_COLUMNS, PARTS_COLUMN, Layout
from sft.suggest import did_you_mean
from sft.untrusted.templates import FillError, fill_in_child, undeclared_variables
from stages.params.schema import MappedSection

TEXT_OF_MESSAGES = (*CONVERSATION_COLUMNS, PARTS_COLUMN, "prompt", "completion")
"""Columns that may hold the JSON text of messages."""

OPTIONAL_NAME = re.compile(r"\b(\w+) is defined\b")
"""A column that rows may lack, in a template that says so."""


class RowMapping:
    """Mapping of the rows of a source: columns are renamed and roles translated, or a template is filled in.

    It records the columns and roles that it has seen, to report names in the section that no row has.

    Args:
        section: Section of params.yaml with `columns`, `roles` and `template`.
    """

    def __init__(self, section: MappedSection) -> None:
        self._columns = section.columns
        self._roles = {tag.strip().lower(): role for tag, role in section.roles.items()}
        self._keys = section.message_keys
        self._templates = section.template.model_dump(exclude_none=True) if section.template else {}
        self._fields = set[str]().union(*map(undeclared_variables, self._templates.values()))
        self._optional = set(OPTIONAL_NAME.findall(" ".join(self._templates.values())))
        self._seen_columns: dict[str, None] = {}
        self._seen_roles: set[str] = set()
        self._seen_keys: set[str] = set()

    def observe(self, row: Mapping[str, Any]) -> None:
        """Record a row's columns and roles."""
        self._seen_columns.update(dict.fromkeys(row))
        if not (self._roles or self._keys):
            return
        for name, value in row.items():
            for message in messages_in(self._columns.get(name, name), value):
                self._seen_keys.update(message)
                renamed = self._renamed(message)
                self._seen_roles.update(
                    str(renamed[key]).strip().lower() for key in ROLE_KEYS if renamed.get(key) is not None
                )

    def seen_columns(self) -> tuple[str, ...]:
        """Return the columns of all observed rows before the mapping."""
        return tuple(self._seen_columns)

    def columns(self) -> tuple[str, ...]:
        """Return the columns of all observed rows after the mapping.

        Raises:
            ValueError: No row has a column or role that the mapping names, or two columns get the same name.
        """
        seen = tuple(self._seen_columns)
        self._check_named("columns", self._columns, seen, "column")
        self._check_named("template", self._fields - self._optional, seen, "column")
        self._check_named("message_keys", self._keys, tuple(self._seen_keys), "key of messages")
        self._check_named("roles", self._roles, tuple(self._seen_roles), "role")
        if self._templates:
            return ("prompt", "completion") if "prompt" in self._templates else ("messages",)
        renamed: dict[str, str] = {}
        for name in seen:
            target = self._columns.get(name, name)
            if target in renamed:
                raise ValueError(
                    f"columns {renamed[target]!r} and {name!r} would both be {target!r}; rename one of them away"
                )
            renamed[target] = name
        return tuple(renamed)

    def unused(self, layout: Layout) -> tuple[str, ...]:
        """Return the columns of the data, by their original names, that are not used in records."""
        used = {*layout.content, layout.context, layout.system, layout.history, *OPTIONAL_COLUMNS, *IMAGE_COLUMNS}
        if self._templates:
            unused = [name for name in self._seen_columns if name not in self._fields]
        else:
            unused = [name for name in self._seen_columns if self._columns.get(name, name) not in used]
        # A lone surrogate can't be written to the data card.
        return tuple(name.encode("utf-8", "backslashreplace").decode() for name in unused)

    def _check_named(self, key: str, named: Iterable[str], seen: tuple[str, ...], what: str) -> None:
        for name in sorted(set(named) - set(seen)):
            hint = did_you_mean(name, seen, before="; ")
            raise ValueError(f"{key} names {name!r}, a {what} that no row has; there are {sorted(seen)[:20]}{hint}")

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row after the mapping.

        Raises:
            RowError: The template can't be filled in from the row.
        """
        if self._templates:
            try:
                texts = fill_in_child(self._templates, row)
            except FillError as error:
                raise RowError("template", str(error)) from error
            if "prompt" in texts:
                return {name: texts[name] for name in ("prompt", "completion")}
            return {"messages": [{"role": role, "content": texts[role]} for role in self._templates]}
        renamed = {self._columns.get(name, name): value for name, value in row.items()}
        if not (self._roles or self._keys):
            return renamed
        return {name: self._translated(name, value) for name, value in renamed.items()}

    def number(self, name: str, row: Mapping[str, Any]) -> float:
        """Return the number in a column, which may be written as text.

        Args:
            name: Name of the column after the mapping.
            row: The row before it.

        Raises:
            RowError: The row has no number there.
        """
        value = row.get(self.origin(name))
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError("curriculum", f"column {name!r} holds {described(value)}, a number is needed")
        return number

    def origin(self, name: str) -> str:
        """Return the name in the data of a column that has a name after the mapping."""
        return next((own for own, renamed in self._columns.items() if renamed == name), name)

    def _translated(self, name: str, value: Any) -> Any:
        """Rename the keys and translate the roles of the messages in a column, if it contains messages."""
        if not messages_in(name, value):
            return value
        if isinstance(value, str):
            return json.dumps(self._translated(name, json.loads(value)), ensure_ascii=False)
        return [self._with_role(self._renamed(message)) for message in value]

    def _renamed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {
            self._keys[key]: item for key, item in message.items() if key in self._keys and item is not None
        }
        return {**{key: item for key, item in message.items() if key not in self._keys}, **given}

    def _with_role(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: self._roles.get(part.strip().lower(), part) if name in ROLE_KEYS and isinstance(part, str) else part
            for name, part in message.items()
        }


def messages_in(column: str, value: Any) -> list[dict[str, Any]]:
    """Return the messages in a column: those of a list, or of its JSON text in a column of conversations."""
    if column in (*OPTIONAL_COLUMNS, *IMAGE_COLUMNS):
        return []
    if isinstance(value, str) and column in TEXT_OF_MESSAGES and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    is_chat = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    return value if is_chat else []
