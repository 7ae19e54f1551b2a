"""Arrow and Parquet files: validated in a child process, then read in this one.

A crafted file can end the process that opens it, so it is first opened, and validated in full, in the child. A file
that passes is read here, because sending every row through a pipe would take longer than reading it. What a value
becomes as an object of Python is bounded by `small_batches`: a table of a few bytes may stand for any number of values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sft.untrusted.child import Child, ChildError, RaisedError, problem

MAX_BYTES = 4 << 30
"""Memory in bytes that a batch may need."""

SECONDS, SECONDS_PER_GB = 60.0, 60.0
"""Time limit for validating a file, and in addition per gigabyte of it."""

BATCH_BYTES, MAX_BATCH_ROWS = 64 << 20, 1024
"""Size in bytes of what is converted to objects of Python at a time, and most rows of it."""

MAX_ROW_BYTES = 1 << 30
"""Largest row in bytes: far larger than any that can be trained."""

MAX_DEPTH = 50
"""Most lists and structs in one another."""

MAX_ROWS, MAX_ROWS_PER_BYTE = 10_000_000, 8
"""Most rows of a file: ten million, or eight per byte if that is more. Nulls take no space, however many they are."""

VALUE_BYTES = 64
"""Rough size in bytes of an object of Python that holds a value."""

_child = Child(MAX_BYTES)


class TableError(ValueError):
    """A file that can't be read; the message says why."""


class NotUtf8Error(ValueError):
    """A text that is not UTF-8; the message is the number of its row, from 1, and the bytes."""


def check_table(path: Path, kind: str) -> int:
    """Validate an Arrow or Parquet file in the child process.

    Args:
        path: The file.
        kind: `Arrow` or `Parquet`.

    Returns:
        Number of rows to read at a time.

    Raises:
        TableError: It is damaged, or takes too long or too much memory.
        NotUtf8Error: A text is not UTF-8.
    """
    stat = path.stat()
    return _checked(str(path.absolute()), kind, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _checked(path: str, kind: str, num_bytes: int, changed: int) -> int:
    del changed  # a part of the key of the cache
    seconds = SECONDS + SECONDS_PER_GB * num_bytes / 1e9
    try:
        return _child.call(_validate_parquet if kind == "Parquet" else _validate_arrow, path, seconds=seconds)
    except ChildError as error:
        if isinstance(error, RaisedError) and error.kind == NotUtf8Error.__name__:
            raise NotUtf8Error(error.message) from None
        raise TableError(problem(error, "reading it")) from None


def _validate_arrow(path: str) -> int:
    """Validate an Arrow file in the child."""
    batches = arrow_batches(Path(path))
    _check_all(batches, Path(path).stat().st_size)
    return MAX_BATCH_ROWS


def _validate_parquet(path: str) -> int:
    """Validate a Parquet file in the child, with batches that fit into memory; return their number of rows."""
    num_rows = MAX_BATCH_ROWS
    while True:
        try:
            with pq.ParquetFile(path) as file:
                _check_schema(file.schema_arrow)
                _check_rows(file.metadata.num_rows, Path(path).stat().st_size)
                _check_all(file.iter_batches(batch_size=num_rows), Path(path).stat().st_size)
        except MemoryError:
            if num_rows == 1:
                raise
            num_rows = max(1, num_rows // 32)
        else:
            return num_rows


def arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file, in the file or the stream format."""
    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        _check_schema(reader.schema)
        if is_file:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _check_all(batches: Iterator[pa.RecordBatch], num_bytes: int) -> None:
    num_rows = 0
    for batch in batches:
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" in str(error):
                _find_not_utf8(batch, num_rows)
            raise
        num_rows += batch.num_rows
        _check_rows(num_rows, num_bytes)


def _find_not_utf8(batch: pa.RecordBatch, num_before: int) -> None:
    for number in range(batch.num_rows):
        try:
            batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            found = error.object[error.start : error.start + 4].hex(" ")
            raise NotUtf8Error(f"{num_before + number + 1}:{found}") from error


def _check_rows(num_rows: int, num_bytes: int) -> None:
    if num_rows > max(MAX_ROWS, MAX_ROWS_PER_BYTE * num_bytes):
        raise TableError(f"it states {num_rows} rows in {num_bytes} bytes")


def _check_schema(schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        seen: set[str] = set()
        twice = next(name for name in schema.names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise TableError(f"two columns are named {twice!r:.80}; rename one of them")
    for field in schema:
        _check_type(field.type, field.name, 1)


def _check_type(kind: pa.DataType, column: str, depth: int) -> None:
    """Check that values of a type can be measured by `_python_bytes`."""
    if depth > MAX_DEPTH:
        raise TableError(f"the column {column!r:.80} has more than {MAX_DEPTH} lists or structs in one another")
    if pa.types.is_dictionary(kind):
        if pa.types.is_nested(kind.value_type) or pa.types.is_dictionary(kind.value_type):
            raise TableError(
                f"the column {column!r:.80} is of the type {kind!s:.80}, which is not read; write it plainly"
            )
        return
    if isinstance(kind, pa.BaseExtensionType):
        _check_type(kind.storage_type, column, depth + 1)
    elif pa.types.is_struct(kind):
        for field in kind:
            _check_type(field.type, column, depth + 1)
    elif pa.types.is_map(kind):
        _check_type(kind.key_type, column, depth + 1)
        _check_type(kind.item_type, column, depth + 1)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _check_type(kind.value_type, column, depth + 1)
    elif pa.types.is_nested(kind) or "view" in str(kind) or "run_end_encoded" in str(kind):
        # unions, and types in which many values share the same bytes
        raise TableError(f"the column {column!r:.80} is of the type {kind!s:.80}, which is not read; write it plainly")


def small_batches(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield a batch in pieces that are small enough to be converted to objects of Python.

    Raises:
        TableError: A single row is too large.
    """
    for start in range(0, batch.num_rows, MAX_BATCH_ROWS):
        yield from _small(batch.slice(start, MAX_BATCH_ROWS))


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    num_bytes = sum(map(_python_bytes, batch.columns))
    if num_bytes <= BATCH_BYTES or (batch.num_rows == 1 and num_bytes <= MAX_ROW_BYTES):
        yield batch
    elif batch.num_rows == 1:
        raise TableError(f"a row takes {num_bytes / 1e9:.1f} GB of memory, more than {MAX_ROW_BYTES / 1e9:.1f}")
    else:
        half = batch.num_rows // 2
        yield from _small(batch.slice(0, half))
        yield from _small(batch.slice(half))


def _python_bytes(array: Any) -> int:
    """Return about how many bytes the values of an array take as objects of Python."""
    kind, size = array.type, VALUE_BYTES * len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return _python_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        if not (pa.types.is_string(kind.value_type) or pa.types.is_binary(kind.value_type)):
            return size
        lengths = pc.binary_length(array.dictionary)
        return size + int(pc.sum(pc.cast(lengths.take(array.indices), pa.int64())).as_py() or 0)
    if pa.types.is_struct(kind):
        return size + sum(map(_python_bytes, array.flatten()))
    if pa.types.is_map(kind):
        return size + _python_bytes(array.keys) + _python_bytes(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return size + _python_bytes(array.flatten())
    if (
        pa.types.is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_large_binary(kind)
    ):
        return size + int(pc.sum(pc.cast(pc.binary_length(array), pa.int64())).as_py() or 0)
    if pa.types.is_fixed_size_binary(kind):
        return size + kind.byte_width * len(array)
    return size
