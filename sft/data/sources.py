"""Rows out of files, folders and the hub, one at a time, each with an id that a person can find again.

Understood are JSON, JSON lines, CSV and TSV (each also as .gz and .zst), Parquet, Arrow files, folders of those,
folders written by `datasets.save_to_disk`, glob patterns, and data sets of the hub. A damaged file is an error that
names the file, the line and, where there is one, the column; nothing is skipped unless asked for, and then it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sft.data.json_reader import json_rows, jsonl_rows
from sft.data.source_row import Row, SourceError
from sft.data.table_reader import arrow_rows, parquet_rows, saved_rows
from sft.data.text_reader import COMPRESSIONS, csv_rows, data_suffix

# What only a folder of `datasets.save_to_disk` holds: one split, or several.
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
PATTERN_LETTERS = "*?["


def data_files(path: Path) -> list[Path]:
    """All data files that a path stands for: a file, a folder (searched to the bottom), or a glob pattern (`**` too).

    Returns:
        Files in the order of their names; for a folder of `datasets.save_to_disk` the folder itself.

    Raises:
        SourceError: There is none.
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
        raise SourceError(f"{path} holds no data file; readable are {readable()}")
    return found


def _matching(pattern: Path) -> Iterator[Path]:
    """What a glob pattern matches; any of its parts may be one."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(letter in part for letter in PATTERN_LETTERS))
    return Path(*parts[:first]).glob("/".join(parts[first:]))


def _is_data(path: Path) -> bool:
    return path.is_file() and is_readable(path.name)


def is_readable(name: str) -> bool:
    """Whether a file of this name is one of data."""
    return data_suffix(Path(name)) in READERS and not name.startswith(".")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return (path / SAVED_DATASET).is_file() or (path / SAVED_SPLITS).is_file()


def _near(path: Path) -> str:
    names = sorted(item.name for item in path.parent.iterdir())[:10] if path.parent.is_dir() else []
    return f"; {path.parent} holds {', '.join(names)}" if names else ""


def readable() -> str:
    """The kinds of file that can be read, for messages."""
    return f"{', '.join(sorted(READERS))}; text files also with {' or '.join(COMPRESSIONS)}"


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    if data_suffix(path) not in READERS:
        raise SourceError(f"{path} is of an unknown kind; readable are {readable()}")
    return READERS[data_suffix(path)]


def read_rows(
    path: Path, name: str | None = None, *, split: str = "train", with_damaged: bool = False
) -> Iterator[Row]:
    """Read one file, or one folder of `datasets.save_to_disk`.

    Args:
        path: What `data_files` returned.
        name: What ids call it; its file name unless given.
        split: Which split of a folder that holds several.
        with_damaged: Give single rows that can't be read too, with their `damage`, instead of stopping there: lines
            that are not JSON, not UTF-8 or no object, and rows of a table with too many or too few fields.

    Raises:
        SourceError: Not readable; says where.
    """
    name = name or path.name
    for row in saved_rows(path, name, split) if is_saved_dataset(path) else _reader(path)(path, name):
        if row.damage is not None and not with_damaged:
            raise row.damage
        yield row


def hub_rows(
    dataset_id: str, config: str | None, split: str, revision: str | None, *, streaming: bool = False
) -> Iterator[Row]:
    """Read a data set of the hub through `datasets`, which keeps a copy unless rows are streamed.

    Args:
        dataset_id: `owner/name`.
        config: Configuration, for data sets that have several.
        split: Split, slices such as `train[:1000]` included.
        revision: Branch, tag or commit.
        streaming: Read rows as they come over the network; splits can't be slices then.
    """
    from datasets import load_dataset

    rows = load_dataset(dataset_id, config, split=split, revision=revision, streaming=streaming)
    for number, row in enumerate(rows, start=1):
        yield Row(f"{dataset_id}/{split}:{number}", dict(row), from_arrow=True)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
