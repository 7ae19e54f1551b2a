"""The sources of params.yaml: found, read through once to learn their columns, and then row by row.

Rows as params.yaml says that they are to be read: columns renamed, roles translated, or a template filled in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import is_offline_mode
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.data.messages import RowError
from sft.data.records import (
    OPTIONAL_COLUMNS,
    Kind,
    Layout,
    detect_layout,
)
from sft.data.remote import fetch_files, is_url
from sft.data.source_row import Row, SourceError
from sft.data.sources import data_files, hub_rows, is_saved_dataset, read_rows
from sft.suggest import did_you_mean
from stages.checkout.paths import Paths, cache_folder
from stages.params.schema import MappedSection, SourceSection

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
            hint = did_you_mean(name, seen, before="; ")
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


class DataFile(NamedTuple):
    """A file, or a folder of `datasets.save_to_disk`.

    Args:
        path: Where it lies on this machine.
        name: What ids call it: its path below data/, or its URL.
        version: What is known of its version when it came from elsewhere.
    """

    path: Path
    name: str
    version: dict[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """One source, ready to be read.

    Args:
        section: What params.yaml says of it.
        files: Its files, none for a data set of the hub.
        mapping: What is done to a row before it is read.
        layout: How its rows are read, decided from the columns of all of them.
        unused: Columns that nothing is read from.
        num_rows: How many rows it has.
        digests: SHA-256 of every file by its name, or of the rows of a data set of the hub.
        with_damaged: Whether single rows that can't be read are among its rows, rather than an error.
    """

    section: SourceSection
    files: tuple[DataFile, ...]
    mapping: RowMapping
    layout: Layout
    unused: tuple[str, ...]
    num_rows: int
    digests: dict[str, str]
    with_damaged: bool

    def rows(self) -> Iterator[Row]:
        """All rows, in the same order at every call."""
        return _rows(self.section, self.files, with_damaged=self.with_damaged)

    def card(self) -> dict[str, Any]:
        """What is worth knowing of it later."""
        layout = {"kind": self.layout.kind.value, "columns": list(self.layout.content), "context": self.layout.context}
        found = {
            "unused": list(self.unused),
            "num_rows": self.num_rows,
            "sha256": self.digests,
            "versions": {file.name: file.version for file in self.files if file.version is not None},
        }
        return {**self.section.model_dump(), **layout, **found}


def open_source(section: SourceSection, paths: Paths, key: str, *, with_damaged: bool = False) -> Source:
    """Find a source and read it once: nothing is written before every row of every source could be read.

    Args:
        section: What params.yaml says of it.
        paths: Paths of the checkout.
        key: Its key in params.yaml, for messages.
        with_damaged: Take single rows that can't be read for rows, which the ledger will name.

    Raises:
        ValueError: It is not there, lies outside data/, is damaged, empty, or has no columns that make sense.
    """
    files = () if section.hub else _files(section, paths, key)
    mapping = RowMapping(section)
    digest = hashlib.sha256()
    num_rows = num_damaged = 0
    first_damage: SourceError | None = None
    for row in _hub_rows(section, key) if section.hub else _rows(section, files, with_damaged=with_damaged):
        num_rows += 1
        num_damaged += row.damage is not None
        first_damage = first_damage or row.damage
        mapping.observe(row.columns)
        if section.hub:
            digest.update(json.dumps(row.columns, sort_keys=True, default=str).encode())
    if num_rows == 0:
        raise ValueError(f"params.yaml, {key}: {section.path} holds no row; give a source that has some")
    if first_damage is not None and num_damaged == num_rows:
        raise first_damage
    try:
        layout = detect_layout(mapping.columns())
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {section.path}: {error}") from error
    if layout.kind is Kind.TOKENIZED:
        raise ValueError(
            f"params.yaml, {key}: {section.path} holds token ids, and the pipeline renders and tokenizes text itself; "
            "give messages, prompt and completion, or text (SFTTrainer of the library takes token ids)"
        )
    digests = {section.path: digest.hexdigest()} if section.hub else _digests(files)
    unused = mapping.unused(layout)
    return Source(section, files, mapping, layout, unused, num_rows, digests, with_damaged)


def data_size(section: SourceSection, paths: Paths, key: str) -> int:
    """Bytes in the files of a source that lies in data/.

    Raises:
        ValueError: It is not there, or lies outside data/.
    """
    files = _local_files(section, paths, key)
    return sum(part.stat().st_size for file in files for part in _parts(file.path) if part.is_file())


def _rows(section: SourceSection, files: tuple[DataFile, ...], *, with_damaged: bool) -> Iterator[Row]:
    if not section.hub:
        return itertools.chain.from_iterable(
            read_rows(file.path, file.name, split=section.split, with_damaged=with_damaged) for file in files
        )
    streaming = section.streaming
    rows = hub_rows(section.path, section.config, section.split, section.revision, streaming=streaming)
    # a stream may be too long to choose from all of it
    return itertools.islice(rows, section.max_rows) if streaming else rows


def _hub_rows(section: SourceSection, key: str) -> Iterator[Row]:
    """Rows of a data set of the hub; what keeps it from being read is named with its key."""
    try:
        yield from _rows(section, (), with_damaged=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        offline = "HF_HUB_OFFLINE is set: unset it, or " if is_offline_mode() else ""
        raise ValueError(
            f"params.yaml, {key}: the data set {section.path!r} of the hub can't be read ({reason}). {offline}Check "
            f"its name, config, split and revision, and the connection; log in with `hf auth login` if it is private; "
            f"or download it elsewhere, copy its files into data/ and set hub: false"
        ) from error


def _files(section: SourceSection, paths: Paths, key: str) -> tuple[DataFile, ...]:
    if not is_url(section.path):
        return _local_files(section, paths, key)
    _refuse_ignored(section, key, with_split=True)
    try:
        found = fetch_files(section.path, cache_folder() / "data")
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {error}") from error
    return tuple(DataFile(file.path, file.url, file.version) for file in found)


def _name(file: Path, data: Path) -> str:
    return Path.cwd().joinpath(file).relative_to(data).as_posix()


def _local_files(section: SourceSection, paths: Paths, key: str) -> tuple[DataFile, ...]:
    """Files below data/; symbolic links in there may lead anywhere, DVC follows them."""
    path = Path(os.path.normpath(paths.root / section.path))
    if not path.is_relative_to(paths.data):
        raise ValueError(
            f"params.yaml, {key}: {section.path!r} lies outside data/, the only folder whose changes DVC sees. Copy it "
            f"there, link it (ln -s /absolute/{path.name} data/{path.name}), fetch it (dvc import-url URL "
            f"data/{path.name}), give its URL, or state hub: true for a data set of the hub"
        )
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    try:
        files = tuple(data_files(shown))
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {error}") from error
    _refuse_ignored(section, key, with_split=not any(is_saved_dataset(file) for file in files))
    return tuple(DataFile(file, _name(file, paths.data)) for file in files)


def _refuse_ignored(section: SourceSection, key: str, *, with_split: bool) -> None:
    ignored = [name for name in ("config", "revision") if getattr(section, name) is not None]
    if ignored or (section.split != "train" and with_split):
        raise ValueError(f"params.yaml, {key}: {ignored or ['split']} would be ignored for {section.path}; remove it")


def _digests(files: tuple[DataFile, ...]) -> dict[str, str]:
    digests = {}
    for file in files:
        for part in filter(Path.is_file, _parts(file.path)):
            inside = f"/{part.relative_to(file.path).as_posix()}" if part != file.path else ""
            with part.open("rb") as stream:
                digests[f"{file.name}{inside}"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _parts(file: Path) -> list[Path]:
    return sorted(file.rglob("*")) if file.is_dir() else [file]
