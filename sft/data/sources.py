"""Reading of rows from files, folders and the Hub, one at a time, each with an id that locates it in its source.

Supported are JSON, JSON lines, CSV and TSV (each also as .gz and .zst), Parquet and Arrow files, folders of those,
folders written by `datasets.save_to_disk`, glob patterns, and data sets of the Hub. A damaged file raises an error that
names the file, the line and, if possible, the column. Damaged rows are returned only on request, marked as damaged.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.data.json_reader import json_rows, jsonl_rows
from sft.data.source_row import Row, SourceError, row_without_added_nulls
from sft.data.table_reader import arrow_rows, parquet_rows, saved_rows
from sft.data.text_reader import COMPRESSIONS, csv_rows, data_suffix

# Files that identify a folder of `datasets.save_to_disk`: with one split, or with several.
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
PATTERN_LETTERS = "*?["
MOST_FILES_COMPARED = 2000
"""Files whose names are compared with that of a missing one."""


def data_files(path: Path) -> list[Path]:
    """List the data files of a path: a file, a folder (searched recursively), or a glob pattern (also with `**`).

    Returns:
        Files, sorted by name; for a folder of `datasets.save_to_disk` the folder itself.

    Raises:
        SourceError: There is no data file.
    """
    if path.is_file() or is_saved_dataset(path):
        if path.is_file():
            _reader(path)
        return [path]
    if path.is_dir():
        found = sorted(item for item in path.rglob("*") if _is_data(item))
    elif any(letter in str(path) for letter in PATTERN_LETTERS):
        found = sorted(item for item in _matching(path) if _is_data(item))
    else:
        raise SourceError(f"{path} does not exist{_near(path)}")
    if not found:
        raise SourceError(f"{path} contains no data file; supported are {readable()}")
    return found


def _matching(pattern: Path) -> Iterator[Path]:
    """Yield the paths that a glob pattern matches; any part of the path may contain wildcards."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(letter in part for letter in PATTERN_LETTERS))
    return Path(*parts[:first]).glob("/".join(parts[first:]))


def _is_data(path: Path) -> bool:
    return path.is_file() and is_readable(path.name)


def is_readable(name: str) -> bool:
    """Return whether a file of this name is in a supported data format."""
    return data_suffix(Path(name)) in READERS and not name.startswith(".")


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by `datasets.save_to_disk`."""
    return (path / SAVED_DATASET).is_file() or (path / SAVED_SPLITS).is_file()


def _near(path: Path) -> str:
    """Return the data file whose path is most like that of a missing one, and what lies in its folder."""
    folder = next((parent for parent in path.parents if parent.is_dir()), path.parent)
    names = sorted(item.name for item in folder.iterdir())[:10] if folder.is_dir() else []
    contained = f"; {folder} contains {', '.join(names)}" if names else ""
    # a project's own folder may be large, and is not data
    files = (item for item in folder.rglob("*") if is_readable(item.name)) if folder != Path() else iter(())
    known = [item.relative_to(folder).as_posix() for item in itertools.islice(files, MOST_FILES_COMPARED)]
    by_name: dict[str, str] = {}
    for name in sorted(known):
        by_name.setdefault(Path(name).name.lower(), name)
    asked = path.relative_to(folder).as_posix()
    near = difflib.get_close_matches(asked, known, n=1) or [
        by_name[name] for name in difflib.get_close_matches(path.name.lower(), by_name, n=1, cutoff=0.5)
    ]
    return f"; did you mean {str(folder / near[0])!r}?{contained}" if near else contained


def readable() -> str:
    """Return the supported file formats, for error messages."""
    return f"{', '.join(sorted(READERS))}; text files also with {' or '.join(COMPRESSIONS)}"


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    if data_suffix(path) not in READERS:
        raise SourceError(f"{path} has an unsupported format; supported are {readable()}")
    return READERS[data_suffix(path)]


def read_rows(
    path: Path, name: str | None = None, *, split: str = "train", with_damaged: bool = False
) -> Iterator[Row]:
    """Read one file, or one folder of `datasets.save_to_disk`.

    Args:
        path: A path that `data_files` returned.
        name: Name of the file in row ids; by default its file name.
        split: Split to read, for a folder with several splits.
        with_damaged: Also yield rows that can't be read, with their `damage`, instead of raising it: lines that are
            not JSON, not UTF-8 or not an object, and rows of a table with too many or too few fields.

    Raises:
        SourceError: The file can't be read; the error states the place.
    """
    name = name or path.name
    for row in saved_rows(path, name, split) if is_saved_dataset(path) else _reader(path)(path, name):
        if row.damage is not None and not with_damaged:
            raise row.damage
        yield row


def hub_rows(
    dataset_id: str, config: str | None, split: str, revision: str | None, *, streaming: bool = False
) -> Iterator[Row]:
    """Read a data set of the Hub with `datasets`, which caches it unless rows are streamed.

    Args:
        dataset_id: `owner/name`.
        config: Name of the configuration, for data sets with several.
        split: Split, or a slice of one such as `train[:1000]`.
        revision: Branch, tag or commit.
        streaming: Read rows from the network without a copy on disk; slices of splits are not supported.
    """
    from datasets import load_dataset

    if Path(dataset_id).exists():  # `load_dataset` would read it instead of the data set of the hub
        raise SourceError(f"{dataset_id} is a file or folder of this machine; rename it, or read it without the hub")
    rows = load_dataset(dataset_id, config, split=split, revision=revision, streaming=streaming)
    for number, row in enumerate(rows, start=1):
        place = f"{dataset_id}/{split}:{number}"
        if rows.features is None:
            yield Row(place, dict(row), has_added_nulls=True)
        else:
            yield Row(place, row_without_added_nulls(row, rows.features))


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
