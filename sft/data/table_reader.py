"""Reading of tables: Parquet and Arrow files, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sft.data.nulls import row_without_added_nulls
from sft.data.source_row import Row, SourceError


def saved_rows(path: Path, name: str, split: str) -> Iterator[Row]:
    """Yield the rows of a folder of `datasets.save_to_disk`; of one split, if it contains several."""
    from datasets import DatasetDict, load_from_disk

    rows = load_from_disk(str(path))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise SourceError(f"{path} has no split {split!r}, only {sorted(rows)}")
        rows = rows[split]
    for number, row in enumerate(rows, start=1):
        yield Row(f"{name}:{number}", row_without_added_nulls(row, rows.features))


def parquet_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=1024), name)
    except (pa.ArrowException, OSError) as error:
        raise _damage(path, "Parquet", error) from error


def arrow_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, in the file or the stream format."""
    try:
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                yield from _table_rows((reader.get_batch(i) for i in range(reader.num_record_batches)), name)
            else:
                yield from _table_rows(pa.ipc.open_stream(file), name)
    except (pa.ArrowException, OSError) as error:
        raise _damage(path, "Arrow", error) from error


def _damage(path: Path, kind: str, error: Exception) -> Exception:
    """Return the error to raise. Arrow reports damaged data as an OSError without errno; a real OSError has one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return SourceError(f"{path}: damaged or incomplete {kind} file: {error}")


def _table_rows(batches: Any, name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        features = {field.name: _feature(field.type) for field in batch.schema}
        for row in _python_rows(batch, name, number):
            number += 1
            yield Row(f"{name}:{number}", row_without_added_nulls(row, features))


class _Leaf(NamedTuple):
    """Type of a value that is neither a struct nor a list, as a feature of `datasets` states it."""

    dtype: str


def _feature(kind: pa.DataType) -> Any:
    """Return a type of Arrow in the form that `sft.data.nulls` reads."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_feature(kind.value_type)]
    return _Leaf(str(kind))


def _python_rows(batch: Any, name: str, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                found = error.object[error.start : error.start + 4].hex(" ")
                place = f"{name}:{before + number + 1}"
                raise SourceError(
                    f"{place}: a text is not UTF-8 (bytes {found}); rewrite the file with UTF-8 text"
                ) from error
        raise
