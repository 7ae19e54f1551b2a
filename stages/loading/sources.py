"""The sources of params.yaml: their files, how their rows are mapped, and how they are read as valid records.

A source is read once when it is opened, to find its columns and its damaged rows, and then row by row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import is_offline_mode

from sft.data.messages import Problem, RowError, validate_record
from sft.data.records import Kind, Layout, detect_layout, normalize, numbers_as_text
from sft.data.remote import fetch_files, is_url
from sft.data.source_row import Row, SourceError
from sft.data.sources import data_files, hub_rows, is_saved_dataset, read_rows
from sft.suggest import did_you_mean
from stages.checkout.ledger import Action
from stages.checkout.paths import Paths, cache_folder
from stages.loading.checks import Note, RowChecks
from stages.loading.images import IMAGE_REASONS, Home, ImageStore, digestible
from stages.loading.mapping import RowMapping
from stages.loading.suggestions import SAMPLE, check_readable, option_line, suggest_options, with_lines
from stages.params.schema import BY_LENGTH, LoadSection, SourceSection
from stages.progress import download_progress

SAMPLE_OF_STREAM = 1000
"""Rows of a stream that are read to learn its columns."""


NOT_TEXT = ("not_text", "content_not_text")
"""Reasons of rows that may contain a number where text is needed."""


class DataFile(NamedTuple):
    """A data file, or a folder of `datasets.save_to_disk`.

    Args:
        path: Path on this machine.
        name: Name in row ids: its path below data/, or its URL.
        version: Size, etag and the like of a downloaded file; None for a local file.
    """

    path: Path
    name: str
    version: dict[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """A source that is ready to be read.

    Args:
        section: Its section in params.yaml.
        files: Its files; empty for a hub data set.
        mapping: Mapping of its rows.
        layout: How rows become records, chosen from the columns of all rows.
        unused: Columns that are not used in records.
        seen: All columns of the data.
        num_rows: Number of rows; None = only the beginning of a stream was looked at.
        digests: SHA-256 of every file by its name, or of the rows of a hub data set.
        with_damaged: Whether single rows that can't be read are yielded with the error, instead of raising it.
    """

    section: SourceSection
    files: tuple[DataFile, ...]
    mapping: RowMapping
    layout: Layout
    unused: tuple[str, ...]
    seen: tuple[str, ...]
    num_rows: int | None
    digests: dict[str, str]
    with_damaged: bool

    def rows(self) -> Iterator[Row]:
        """Yield all rows, in the same order at every call."""
        return _rows(self.section, self.files, with_damaged=self.with_damaged)

    def folder_of(self, row: Row, data: Path) -> Path | None:
        """Return the folder of a row's file, where its relative paths start; None if it is not a file in data/."""
        if self.section.hub or is_url(self.section.path):
            return None
        return (data / row.id.rpartition(":")[0]).parent

    def with_number(self, column: str | None, key: str) -> Source:
        """Return the source with the column of `load.curriculum` among the used ones.

        Args:
            column: Name of the column after the mapping; None or `length` = none is needed.
            key: Key of the source in params.yaml, for messages.

        Raises:
            ValueError: No row has the column.
        """
        if column is None or column == BY_LENGTH:
            return self
        own = self.mapping.origin(column)
        if own not in self.seen:
            hint = did_you_mean(column, self.seen, before="; ")
            raise ValueError(
                f"params.yaml, load.curriculum: no row of {self.section.path} ({key}) has the column {own!r}; there "
                f"are {sorted(self.seen)[:20]}{hint}"
            )
        return replace(self, unused=tuple(name for name in self.unused if name != own))

    def card(self) -> dict[str, Any]:
        """Return what the data card states of the source."""
        layout = {"kind": self.layout.kind.value, "columns": list(self.layout.content), "context": self.layout.context}
        found = {
            "unused": list(self.unused),
            "num_rows": self.num_rows,
            "sha256": self.digests,
            "versions": {file.name: file.version for file in self.files if file.version is not None},
        }
        return {**self.section.model_dump(), **layout, **found}


def open_source(
    section: SourceSection, paths: Paths, key: str, *, with_damaged: bool = False, begin_only: bool = False
) -> Source:
    """Find a source and read it once, so that `load` writes nothing unless every row of every source can be read.

    Args:
        section: Its section in params.yaml.
        paths: Paths of the checkout.
        key: Its key in params.yaml, for messages.
        with_damaged: Whether single rows that can't be read count as rows, for the ledger, instead of raising an error.
        begin_only: Read only the first `SAMPLE_OF_STREAM` rows.

    Raises:
        ValueError: The source does not exist, lies outside data/, is damaged or empty, or its columns have no known
            layout.
    """
    files = () if section.hub else source_files(section, paths, key)
    mapping = RowMapping(section)
    digest = hashlib.sha256()
    num_rows = num_damaged = 0
    first_damage: SourceError | None = None
    sample: list[Row] = []
    rows = _hub_rows(section, key) if section.hub else _rows(section, files, with_damaged=with_damaged)
    for row in itertools.islice(rows, SAMPLE_OF_STREAM if begin_only else None):
        num_rows += 1
        num_damaged += row.damage is not None
        first_damage = first_damage or row.damage
        mapping.observe(row.columns)
        if row.damage is None and len(sample) < SAMPLE:
            sample.append(row)
        if section.hub:
            digest.update(json.dumps(row.columns, sort_keys=True, default=digestible).encode())
    if num_rows == 0:
        raise ValueError(f"params.yaml, {key}: {section.path} has no rows; give a source that has some")
    if first_damage is not None and num_damaged == num_rows:
        raise first_damage
    try:
        columns = mapping.columns()
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {section.path}: {error}") from error
    try:
        layout = detect_layout(columns)
        check_readable(sample, mapping, layout)
    except ValueError as error:
        raise ValueError(with_lines(f"params.yaml, {key}: {section.path}: {error}", section, sample, key)) from error
    if layout.kind is Kind.TOKENIZED:
        raise ValueError(
            f"params.yaml, {key}: {section.path} contains token ids, but the pipeline renders and tokenizes text "
            "itself; give messages, prompt and completion, or text (SFTTrainer of the library takes token ids)"
        )
    digests = {section.path: digest.hexdigest()} if section.hub else _digests(files)
    unused = mapping.unused(layout)
    known = None if begin_only else num_rows
    return Source(section, files, mapping, layout, unused, mapping.seen_columns(), known, digests, with_damaged)


def data_size(section: SourceSection, paths: Paths, key: str) -> int:
    """Return the size in bytes of a source in data/.

    Args:
        section: Its section in params.yaml.
        paths: Paths of the checkout.
        key: Its key in params.yaml, for messages.

    Raises:
        ValueError: The source does not exist, or lies outside data/.
    """
    files = local_files(section, paths, key)
    return sum(part.stat().st_size for file in files for part in _parts(file.path) if part.is_file())


def _rows(section: SourceSection, files: tuple[DataFile, ...], *, with_damaged: bool) -> Iterator[Row]:
    if not section.hub:
        return itertools.chain.from_iterable(
            read_rows(file.path, file.name, split=section.split, with_damaged=with_damaged) for file in files
        )
    streaming = section.streaming
    rows = hub_rows(section.path, section.config, section.split, section.revision, streaming=streaming)
    # A stream may be too long to choose from all of its rows.
    return itertools.islice(rows, section.max_rows) if streaming else rows


def _hub_rows(section: SourceSection, key: str) -> Iterator[Row]:
    """Yield the rows of a hub data set; an error names the key in params.yaml."""
    try:
        yield from _rows(section, (), with_damaged=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        offline = "HF_HUB_OFFLINE is set: unset it, or " if is_offline_mode() else ""
        raise ValueError(
            f"params.yaml, {key}: the hub data set {section.path!r} can't be read ({reason}). {offline}Check its "
            f"name, config, split and revision, and the connection; log in with `hf auth login` if it is private; or "
            f"download it elsewhere, copy its files into data/ and set hub: false"
        ) from error


def source_files(section: SourceSection, paths: Paths, key: str) -> tuple[DataFile, ...]:
    """Find the files of a source in data/, or download those of a URL."""
    if not is_url(section.path):
        return local_files(section, paths, key)
    _refuse_ignored(section, key, with_split=True)
    try:
        found = fetch_files(section.path, cache_folder() / "data", download_progress)
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {error}") from error
    return tuple(DataFile(file.path, file.url, file.version) for file in found)


def _name(file: Path, data: Path) -> str:
    return Path.cwd().joinpath(file).relative_to(data).as_posix()


def local_files(section: SourceSection, paths: Paths, key: str) -> tuple[DataFile, ...]:
    """Find the files of a source in data/. Symbolic links in data/ may lead anywhere, since DVC follows them."""
    path = Path(os.path.normpath(paths.root / section.path))
    if not path.is_relative_to(paths.data):
        raise ValueError(
            f"params.yaml, {key}: {section.path!r} lies outside data/, the only folder whose changes DVC sees. Copy it "
            f"there, link it (ln -s /absolute/{path.name} data/{path.name}), fetch it (dvc import-url URL "
            f"data/{path.name}), give its URL, or state hub: true for a hub data set"
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


class RecordReader:
    """Normalization and checks of single rows.

    Args:
        section: The section `load` of params.yaml.
        images: Folder of the rows' images.
        data: The folder that paths of images may not lead out of.
    """

    def __init__(self, section: LoadSection, images: ImageStore, data: Path) -> None:
        self._section = section
        self._images = images
        self._data = data
        self._row_checks = RowChecks(section.checks)
        self._hints: dict[tuple[str, str], str] = {}

    def read(self, row: Row, source: Source) -> tuple[dict[str, Any], list[Note]]:
        """Return the row as a record that is valid for training, and what was found in it.

        Raises:
            RowError: The row is not valid.
        """
        record, of_numbers = self._normalized(row, source)
        record, notes = self._row_checks.inspect(record)
        return record, [*of_numbers, *notes, *self._validated(record)]

    def _validated(self, record: dict[str, Any]) -> list[Note]:
        """Check that a record is valid for training; return a note of empty answers if they are allowed."""
        problems = validate_record(record, require_alternation=self._section.require_alternation)
        wanted = self._section.checks.empty_answer
        invalid = [problem for problem in problems if problem.reason != "empty_answer" or wanted == "drop"]
        if invalid:
            raise RowError(invalid[0].reason, "; ".join(problem.detail for problem in invalid))
        return [Note(Action(wanted), problem) for problem in problems[:1] if wanted != "off"]

    def _normalized(self, row: Row, source: Source) -> tuple[dict[str, Any], list[Note]]:
        """Return the row as a record, and a note if numbers in it were changed to text."""
        if row.damage is not None:
            raise RowError("unreadable", str(row.damage))
        columns = source.mapping.apply(row.columns)
        try:
            record = normalize(columns, source.layout, prune_nulls=row.has_added_nulls)
            return self._with_images(record, columns, row, source), []
        except RowError as error:
            columns, found = numbers_as_text(columns, source.layout)
            if error.reason not in NOT_TEXT or not found:
                raise
        wanted, problem = self._section.checks.number, Problem("number", "; ".join(found)[:300])
        if wanted == "drop":
            raise RowError("number", f"{problem.detail}, where text is needed; load.checks.number: repair writes it so")
        record = normalize(columns, source.layout, prune_nulls=row.has_added_nulls)
        return self._with_images(record, columns, row, source), [Note(Action(wanted), problem)]

    def _with_images(self, record: dict[str, Any], columns: dict[str, Any], row: Row, source: Source) -> dict[str, Any]:
        """Return a record with the names of its images' files, see `ImageStore.placed`.

        Raises:
            RowError: An image can't be used.
            ValueError: The same, and `load.checks.image` is `fail`.
        """
        home = Home(source.folder_of(row, self._data), self._data)
        try:
            return self._images.placed(record, columns, source.layout.content, home)
        except RowError as error:
            if error.reason in IMAGE_REASONS and self._section.checks.image == "fail":
                raise ValueError(f"params.yaml, load.checks.image: {row.id}: {error}") from None
            raise

    def hint(self, error: RowError, row: Row, source: Source) -> str:
        """Return the options of the source with which a row could be read; empty if there are none."""
        if not error.mapping:
            return ""
        found = (source.section.path, str(error.mapping))
        if found not in self._hints:
            options = suggest_options(source.section, [row])
            lines = ", ".join(option_line(name, names) for name, names in options.items())
            self._hints[found] = f"; an option of the source in params.yaml reads it: {lines}" if lines else ""
        return self._hints[found]
