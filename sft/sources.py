"""Rows out of files, folders and the hub, one at a time, each with an id that a person can find again.

Understood are JSON, JSON lines, CSV and TSV (each also as .gz and .zst), Parquet, Arrow files, folders of those,
folders written by `datasets.save_to_disk`, glob patterns, and data sets of the hub. A damaged file is an error that
names the file, the line and, where there is one, the column; nothing is skipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

BOM = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst")
# What only a folder of `datasets.save_to_disk` holds: one split, or several.
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
_WHITESPACE = " \t\r\n"
# Names under which a JSON file may hold its list of rows.
_WRAPPERS = {"data", "rows", "examples", "instances", "train"}


class Row(NamedTuple):
    """One row of a source.

    Args:
        id: Where it is: `file:line` for text files, `file:row` (from 1) for tables.
        columns: Column -> value.
        from_arrow: Whether it comes out of an Arrow table, whose structs hold nulls that nobody wrote.
    """

    id: str
    columns: dict[str, Any]
    from_arrow: bool = False


class SourceError(ValueError):
    """A file that cannot be read as what its name says."""


def data_files(path: Path) -> list[Path]:
    """All data files that a path stands for: a file, a folder (searched to the bottom), or a glob pattern.

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
    elif any(letter in path.name for letter in "*?["):
        found = sorted(item for item in path.parent.glob(path.name) if _is_data(item))
    else:
        raise SourceError(f"{path} does not exist{_near(path)}")
    if not found:
        raise SourceError(f"{path} holds no data file; readable are {_readable()}")
    return found


def _is_data(path: Path) -> bool:
    return path.is_file() and _suffix(path) in READERS and not path.name.startswith(".")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return (path / SAVED_DATASET).is_file() or (path / SAVED_SPLITS).is_file()


def _near(path: Path) -> str:
    names = sorted(item.name for item in path.parent.iterdir())[:10] if path.parent.is_dir() else []
    return f"; {path.parent} holds {', '.join(names)}" if names else ""


def _readable() -> str:
    return f"{', '.join(sorted(READERS))}; text files also with {' or '.join(COMPRESSIONS)}"


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    if _suffix(path) not in READERS:
        raise SourceError(f"{path} is of an unknown kind; readable are {_readable()}")
    return READERS[_suffix(path)]


def read_rows(path: Path, name: str | None = None, *, split: str = "train") -> Iterator[Row]:
    """Read one file, or one folder of `datasets.save_to_disk`.

    Args:
        path: What `data_files` returned.
        name: What ids call it; its file name unless given.
        split: Which split of a folder that holds several.

    Raises:
        SourceError: Not readable; says where.
    """
    name = name or path.name
    if is_saved_dataset(path):
        yield from _saved_rows(path, name, split)
    else:
        yield from _reader(path)(path, name)


def hub_rows(dataset_id: str, config: str | None, split: str, revision: str | None) -> Iterator[Row]:
    """Read a data set of the hub through `datasets`, which caches it.

    Args:
        dataset_id: `owner/name`.
        config: Configuration, for data sets that have several.
        split: Split, slices such as `train[:1000]` included.
        revision: Branch, tag or commit.
    """
    from datasets import load_dataset

    rows = load_dataset(dataset_id, config, split=split, revision=revision)
    for number, row in enumerate(rows, start=1):
        yield Row(f"{dataset_id}/{split}:{number}", dict(row), from_arrow=True)


def _saved_rows(path: Path, name: str, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    rows = load_from_disk(str(path))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise SourceError(f"{path} has no split {split!r}, only {sorted(rows)}")
        rows = rows[split]
    for number, row in enumerate(rows, start=1):
        yield Row(f"{name}:{number}", dict(row), from_arrow=True)


def _open(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".zst":
            return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers, line ends kept, without a byte order mark."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, _decode(line.removeprefix(BOM) if number == 1 else line, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:
        raise SourceError(f"{path}:{number + 1}: the compressed data is damaged or ends too early: {error}") from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 4].hex(" ")
        raise SourceError(f"{path}:{number}:{error.start + 1}: not UTF-8 (bytes {found}); convert the file") from error


def _jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    is_first = True
    for number, line in _lines(path):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            hint = _LIST_HINT if is_first and line.lstrip().startswith("[") else ""
            raise SourceError(f"{place}:{error.colno}: not JSON: {error.msg}, in {_excerpt(error)}{hint}") from error
        except RepeatedKeyError as error:
            raise SourceError(f"{place}: {error}") from error
        if is_first and isinstance(value, list):
            raise SourceError(f"{place}: a row must be a JSON object, not {_shown(value)}{_LIST_HINT}")
        is_first = False
        yield Row(f"{name}:{number}", _object(value, place))


class RepeatedKeyError(ValueError):
    """A JSON object that states a key twice: which of the two is meant, nobody can tell."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object; remove one of the two")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LIST_HINT = "; a list of all rows is a .json file: rename it to .json, or write one object a line"
_JSON_NAMES: dict[type, str] = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}


def _shown(value: Any) -> str:
    """A JSON value as its kind and beginning; null is its own kind."""
    return "null" if value is None else f"{_JSON_NAMES.get(type(value), type(value).__name__)} {value!r:.60}"


def _excerpt(error: json.JSONDecodeError) -> str:
    return repr(error.doc[max(0, error.pos - 30) : error.pos + 30].strip("\r\n"))


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError(f"{place}: a row must be a JSON object, not {_shown(value)}")
    return value


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSON file: a list of objects, one object that holds such a list, or objects one after the other."""
    text = "".join(line for _, line in _lines(path))
    line, position, on_line = 1, 0, 0
    try:
        for at, value in _elements(text):
            passed = text.count("\n", position, at)
            line, position, on_line = line + passed, at, 1 if passed else on_line + 1
            number = f"{line}" if on_line <= 1 else f"{line}#{on_line}"
            yield Row(f"{name}:{number}", _object(value, f"{path}:{number}"))
    except RepeatedKeyError as error:
        raise SourceError(f"{path}: in or after the row at line {line}: {error}") from error
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise SourceError(f"{place}: not JSON: {error.msg}, in {_excerpt(error)}") from error


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON text, each with its position, without building a list of all."""
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _list_elements(text, start)
        return
    if start == len(text):
        return
    value, end = _DECODER.raw_decode(text, start)
    if not text[end:].strip(_WHITESPACE) and isinstance(value, dict) and len(value) == 1 and value.keys() & _WRAPPERS:
        yield from _list_elements(text, text.index("[", start))
        return
    while start < len(text):
        value, end = _DECODER.raw_decode(text, start)
        yield start, value
        start = _skip(text, end)


def _list_elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    at = _skip(text, start + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        end = _skip(text, end)
        if text[end : end + 1] == "]":
            return
        if text[end : end + 1] != ",":
            raise json.JSONDecodeError("expected , or ] after a row", text, end)
        at = _skip(text, end + 1)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _WHITESPACE and at < len(text):
        at += 1
    return at


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for fields in reader:
            if header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise SourceError(
                        f"{path}:{number}: {len(fields)} fields where the header has {len(header)}: {header}"
                    )
                yield Row(f"{name}:{number}", dict(zip(header, fields, strict=True)))
            number = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{path}:{reader.line_num}: not {_suffix(path)[1:].upper()}: {error}") from error


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=1024), name)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a whole Parquet file: {error}") from error


def _arrow_rows(path: Path, name: str) -> Iterator[Row]:
    try:
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                yield from _table_rows((reader.get_batch(i) for i in range(reader.num_record_batches)), name)
            else:
                yield from _table_rows(pa.ipc.open_stream(file), name)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a whole Arrow file: {error}") from error


def _table_rows(batches: Any, name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Row(f"{name}:{number}", row, from_arrow=True)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
