"""Rows as params.yaml says that they are to be read: columns renamed, roles translated, or a template filled in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.data.records import OPTIONAL_COLUMNS, Layout, RowError
from stages.params.load_params import MappedSection

ROLE_KEYS = {"role", "from"}
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


class RowMapping:
    """Turns rows of a source into rows whose columns and roles are known, and finds what the section names in vain.

    Args:
        section: `columns`, `roles` and `template` of a source in params.yaml.
    """

    def __init__(self, section: MappedSection) -> None:
        self._columns = section.columns
        self._roles = {tag.strip().lower(): role for tag, role in section.roles.items()}
        texts = section.template.model_dump(exclude_none=True) if section.template else {}
        self._templates = {role: _JINJA.from_string(text) for role, text in texts.items()}
        self._fields = {name for text in texts.values() for name in meta.find_undeclared_variables(_JINJA.parse(text))}
        self._seen_columns: dict[str, None] = {}
        self._seen_roles: set[str] = set()

    def observe(self, row: Mapping[str, Any]) -> None:
        """Take note of a row's columns and roles."""
        self._seen_columns.update(dict.fromkeys(row))
        if self._roles:
            messages = (message for value in row.values() if isinstance(value, list) for message in value)
            tags = (
                message[key] for message in messages if isinstance(message, dict) for key in ROLE_KEYS & message.keys()
            )
            self._seen_roles.update(str(tag).strip().lower() for tag in tags)

    def columns(self) -> tuple[str, ...]:
        """The columns of all rows observed, as they are after mapping.

        Raises:
            ValueError: A column, a field or a role of the mapping is in none of the rows, or two columns get one name.
        """
        seen = tuple(self._seen_columns)
        self._check_named("columns", self._columns, seen, "column")
        self._check_named("template", self._fields, seen, "column")
        self._check_named("roles", self._roles, tuple(self._seen_roles), "role")
        if self._templates:
            return ("messages",)
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
        """The columns of the data, by their own names, that go into no record."""
        used = {*layout.content, layout.context, layout.system, layout.history, *OPTIONAL_COLUMNS}
        if self._templates:
            unused = [name for name in self._seen_columns if name not in self._fields]
        else:
            unused = [name for name in self._seen_columns if self._columns.get(name, name) not in used]
        # half a surrogate pair can't be written to the data card
        return tuple(name.encode("utf-8", "backslashreplace").decode() for name in unused)

    def _check_named(self, key: str, named: Iterable[str], seen: tuple[str, ...], what: str) -> None:
        for name in sorted(set(named) - set(seen)):
            near = difflib.get_close_matches(name, seen, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key} names {name!r}, a {what} that no row has; there are {sorted(seen)[:20]}{hint}")

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row, mapped.

        Raises:
            RowError: The template can't be filled in from it.
        """
        if self._templates:
            return {"messages": [{"role": role, "content": self._fill(role, row)} for role in self._templates]}
        renamed = {self._columns.get(name, name): value for name, value in row.items()}
        if not self._roles:
            return renamed
        return {name: self._translated(value) for name, value in renamed.items()}

    def _fill(self, role: str, row: Mapping[str, Any]) -> str:
        try:
            return self._templates[role].render({name: "" if value is None else value for name, value in row.items()})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RowError("template", f"the template of {role} can't be filled in: {error}") from error

    def _translated(self, value: Any) -> Any:
        """A column; where it holds messages, with their roles translated."""
        if not isinstance(value, list):
            return value
        return [self._with_role(message) if isinstance(message, dict) else message for message in value]

    def _with_role(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: self._roles.get(part.strip().lower(), part) if name in ROLE_KEYS and isinstance(part, str) else part
            for name, part in message.items()
        }
