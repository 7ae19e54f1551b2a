"""Reading of tables: Parquet and Arrow files, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sft.data.source_row import Row, SourceError, row_without_added_nulls
from sft.untrusted.tables import NotUtf8Error, TableError, arrow_batches, check_table, small_batches


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
        num_rows = check_table(path, "Parquet")
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=num_rows), name)
    except NotUtf8Error as error:
        raise _not_utf8(error, name) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: the name of a column is not UTF-8 ({error}); rename it") from error
    except (pa.ArrowException, TableError, OSError) as error:
        raise _damage(path, "Parquet", error) from error


def arrow_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, in the file or the stream format."""
    try:
        check_table(path, "Arrow")
        yield from _table_rows(arrow_batches(path), name)
    except NotUtf8Error as error:
        raise _not_utf8(error, name) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: the name of a column is not UTF-8 ({error}); rename it") from error
    except (pa.ArrowException, TableError, OSError) as error:
        raise _damage(path, "Arrow", error) from error


def _not_utf8(error: NotUtf8Error, name: str) -> SourceError:
    number, _, found = str(error).partition(":")
    return SourceError(f"{name}:{number}: a text is not UTF-8 (bytes {found}); rewrite the file with UTF-8 text")


def _damage(path: Path, kind: str, error: Exception) -> Exception:
    """Return the error to raise. Arrow reports damaged data as an OSError without errno; a real OSError has one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return SourceError(f"{path}: damaged or incomplete {kind} file: {error}")


def _table_rows(batches: Any, name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        features = {field.name: _feature(field.type) for field in batch.schema}
        for piece in small_batches(batch):
            for row in piece.to_pylist():
                number += 1
                yield Row(f"{name}:{number}", row_without_added_nulls(row, features))


class _Leaf(NamedTuple):
    """Type of a value that is neither a struct nor a list, as a feature of `datasets` states it."""

    dtype: str


def _feature(kind: pa.DataType) -> Any:
    """Return a type of Arrow in the form that `sft.data.source_row` reads."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_feature(kind.value_type)]
    return _Leaf(str(kind))
