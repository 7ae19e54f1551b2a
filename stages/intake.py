"""The sources of params.yaml: found, read through once to learn their columns, and then row by row."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from sft.records import Kind, Layout, detect_layout
from sft.sources import Row, data_files, hub_rows, is_saved_dataset, read_rows
from stages.load_params import SourceSection
from stages.paths import Paths
from stages.source_mapping import RowMapping


@dataclass(frozen=True)
class Source:
    """One source, ready to be read.

    Args:
        section: What params.yaml says of it.
        files: Its local files, none for a data set of the hub.
        data: The folder that ids are relative to.
        mapping: What is done to a row before it is read.
        layout: How its rows are read, decided from the columns of all of them.
        unused: Columns that nothing is read from.
        num_rows: How many rows it has.
        digests: SHA-256 of every file by its name, or of the rows of a data set of the hub.
    """

    section: SourceSection
    files: tuple[Path, ...]
    data: Path
    mapping: RowMapping
    layout: Layout
    unused: tuple[str, ...]
    num_rows: int
    digests: dict[str, str]

    def rows(self) -> Iterator[Row]:
        """All rows, in the same order at every call."""
        return _rows(self.section, self.files, self.data)

    def card(self) -> dict[str, Any]:
        """What is worth knowing of it later."""
        layout = {"kind": self.layout.kind.value, "columns": list(self.layout.content), "context": self.layout.context}
        layout["unused"] = list(self.unused)
        return {**self.section.model_dump(), **layout, "num_rows": self.num_rows, "sha256": self.digests}


def open_source(section: SourceSection, paths: Paths, key: str) -> Source:
    """Find a source and read it once: nothing is written before every row of every source could be read.

    Args:
        section: What params.yaml says of it.
        paths: Paths of the checkout.
        key: Its key in params.yaml, for messages.

    Raises:
        ValueError: It is not there, lies outside data/, is damaged, empty, or has no columns that make sense.
    """
    files = () if section.hub else _local_files(section, paths, key)
    mapping = RowMapping(section)
    digest = hashlib.sha256()
    num_rows = 0
    for row in _hub_rows(section, key) if section.hub else _rows(section, files, paths.data):
        num_rows += 1
        mapping.observe(row.columns)
        if section.hub:
            digest.update(json.dumps(row.columns, sort_keys=True, default=str).encode())
    if num_rows == 0:
        raise ValueError(f"params.yaml, {key}: {section.path} holds no row; give a source that has some")
    try:
        layout = detect_layout(mapping.columns())
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {section.path}: {error}") from error
    if layout.kind is Kind.TOKENIZED:
        raise ValueError(
            f"params.yaml, {key}: {section.path} holds token ids, and the pipeline renders and tokenizes text itself; "
            "give messages, prompt and completion, or text (SFTTrainer of the library takes token ids)"
        )
    digests = {section.path: digest.hexdigest()} if section.hub else _digests(files, paths.data)
    unused = mapping.unused(layout)
    return Source(section, files, paths.data, mapping, layout, unused, num_rows, digests)


def data_size(section: SourceSection, paths: Paths, key: str) -> int:
    """Bytes in the files of a local source.

    Raises:
        ValueError: It is not there, or lies outside data/.
    """
    files = _local_files(section, paths, key)
    return sum(part.stat().st_size for file in files for part in _parts(file) if part.is_file())


def _rows(section: SourceSection, files: tuple[Path, ...], data: Path) -> Iterator[Row]:
    if section.hub:
        return hub_rows(section.path, section.config, section.split, section.revision)
    return itertools.chain.from_iterable(read_rows(file, _name(file, data), split=section.split) for file in files)


def _hub_rows(section: SourceSection, key: str) -> Iterator[Row]:
    """Rows of a data set of the hub; what keeps it from being read is named with its key."""
    try:
        yield from _rows(section, (), Path())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        offline = "HF_HUB_OFFLINE is set: unset it, or " if is_offline_mode() else ""
        raise ValueError(
            f"params.yaml, {key}: the data set {section.path!r} of the hub can't be read ({reason}). {offline}Check "
            f"its name, config, split and revision, and the connection; log in with `hf auth login` if it is private; "
            f"or download it elsewhere, copy its files into data/ and set hub: false"
        ) from error


def _name(file: Path, data: Path) -> str:
    return Path.cwd().joinpath(file).relative_to(data).as_posix()


def _local_files(section: SourceSection, paths: Paths, key: str) -> tuple[Path, ...]:
    """Files below data/; symbolic links in there may lead anywhere, DVC follows them."""
    path = Path(os.path.normpath(paths.root / section.path))
    if not path.is_relative_to(paths.data):
        raise ValueError(
            f"params.yaml, {key}: {section.path!r} lies outside data/, the only folder whose changes DVC sees. Copy it "
            f"there, link it (ln -s /absolute/{path.name} data/{path.name}), fetch it (dvc import-url URL "
            f"data/{path.name}), or state hub: true for a data set of the hub"
        )
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    try:
        files = tuple(data_files(shown))
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {error}") from error
    saved = any(is_saved_dataset(file) for file in files)
    ignored = [name for name in ("config", "revision") if getattr(section, name) is not None]
    if ignored or (section.split != "train" and not saved):
        raise ValueError(
            f"params.yaml, {key}: {ignored or ['split']} would be ignored for local {section.path}; remove it"
        )
    return files


def _digests(files: tuple[Path, ...], data: Path) -> dict[str, str]:
    digests = {}
    for part in (part for file in files for part in _parts(file)):
        if part.is_file():
            with part.open("rb") as stream:
                digests[_name(part, data)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _parts(file: Path) -> list[Path]:
    return sorted(file.rglob("*")) if file.is_dir() else [file]
