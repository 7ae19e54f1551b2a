"""Token columns: cut and join rows on Arrow buffers, without a Python object per token.

Packing and truncation are planned as a list of pieces (document, start, length) and a division of that list into output
rows (`RowPlan`). `materialize` turns a plan into a data set, a bounded number of tokens at a time. `write_rows` writes
tables one at a time to a folder for `datasets.load_from_disk`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory
from datasets.table import InMemoryTable, MemoryMappedTable

from sft.labels import IGNORE_INDEX, TOKEN_MASKS

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", *TOKEN_MASKS, "loss_weights")
"""Columns with one value per token, which are cut and joined together."""

COLUMN_TYPES = {
    "attention_mask": np.int8,
    **dict.fromkeys(TOKEN_MASKS, np.int8),
    "loss_weights": np.float32,
}
"""Types of the columns that are written; ids and labels are int32."""

TOKENS_PER_BATCH = 1 << 22
"""Tokens to process at a time."""

MAX_FILE_BYTES = 500 << 20
"""Size from which `write_rows` begins the next file."""

Integers = npt.NDArray[np.int64]


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """Concatenate `arange(start, start + length)` for every pair, without a loop."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


@dataclass(frozen=True)
class Pieces:
    """Contiguous parts of documents, in output order.

    Attributes:
        document: `(num_pieces,)` row of the source.
        start: `(num_pieces,)` first token of each piece in its document.
        length: `(num_pieces,)` number of tokens in each piece.
    """

    document: Integers
    start: Integers
    length: Integers

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, key: Any) -> Pieces:
        return Pieces(self.document[key], self.start[key], self.length[key])

    def within(self, outer: Pieces) -> Pieces:
        """Return these pieces in terms of the source documents, if their documents are the pieces `outer`."""
        return Pieces(outer.document[self.document], outer.start[self.document] + self.start, self.length)


def whole(lengths: Integers) -> Pieces:
    """Return every document as one piece."""
    return Pieces(np.arange(len(lengths)), np.zeros_like(lengths), lengths)


class Column(Protocol):
    """A column with one list of values per document, in memory or in a file."""

    def lengths(self) -> Integers:
        """Return the number of tokens in each document, `(num_documents,)`."""

    def gather(self, pieces: Pieces, dtype: Any) -> np.ndarray[Any, Any]:
        """Return the values of all pieces one after another, `(sum of lengths,)`."""


Columns = Mapping[str, Column]


class RaggedColumn:
    """A list column of a data set as offsets and values, in chunks as Arrow stores it."""

    def __init__(self, name: str, column: pa.ChunkedArray, indices: Integers | None) -> None:
        self._indices = indices
        self._offsets: list[Integers] = []
        self._values: list[np.ndarray[Any, Any]] = []
        for chunk in column.chunks:
            offsets, values = _buffers(name, chunk)
            self._offsets.append(offsets)
            self._values.append(values)
        self._first_rows = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])

    def lengths(self) -> Integers:
        """Return the number of tokens in each document, `(num_documents,)`."""
        stored = [np.diff(offsets) for offsets in self._offsets]
        lengths = np.concatenate(stored).astype(np.int64) if stored else np.zeros(0, dtype=np.int64)
        return lengths if self._indices is None else lengths[self._indices]

    def gather(self, pieces: Pieces, dtype: Any) -> np.ndarray[Any, Any]:
        """Return the values of all pieces one after another, `(sum of lengths,)`."""
        output = np.empty(int(pieces.length.sum()), dtype=dtype)
        places = np.cumsum(pieces.length) - pieces.length
        for chunk, picked, first_values in self._by_chunk(pieces):
            lengths = pieces.length[picked]
            output[ranges(places[picked], lengths)] = self._values[chunk][ranges(first_values, lengths)]
        return output

    def _by_chunk(self, pieces: Pieces) -> Iterator[tuple[int, Integers, Integers]]:
        """Yield each chunk that has pieces, the indices of those pieces, and where their values begin in the chunk."""
        rows = pieces.document if self._indices is None else self._indices[pieces.document]
        chunk_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        for chunk in np.unique(chunk_of):
            picked = np.flatnonzero(chunk_of == chunk)
            first_values = self._offsets[chunk][rows[picked] - self._first_rows[chunk]] + pieces.start[picked]
            yield int(chunk), picked, first_values


def count_trained(labels: Column, pieces: Pieces) -> tuple[Integers, Integers]:
    """Count the trained tokens and the targets in each piece.

    A piece's first label is not a target, since there is no token before it to predict it from.

    Args:
        labels: The column of labels.
        pieces: The pieces to count in.

    Returns:
        Trained tokens `(num_pieces,)` and targets `(num_pieces,)`.
    """
    trained = np.zeros(len(pieces), dtype=np.int64)
    targets = np.zeros(len(pieces), dtype=np.int64)
    plan = RowPlan(pieces, np.arange(1, len(pieces) + 1))
    for first, last in plan.batches():
        batch = pieces[first:last]
        running = np.concatenate([[0], np.cumsum(labels.gather(batch, np.int32) != IGNORE_INDEX)])
        ends = np.cumsum(batch.length)
        starts = ends - batch.length
        trained[first:last] = running[ends] - running[starts]
        targets[first:last] = running[ends] - running[np.minimum(starts + 1, ends)]
    return trained, targets


def _buffers(name: str, chunk: Any) -> tuple[Integers, np.ndarray[Any, Any]]:
    if not isinstance(chunk, pa.ListArray | pa.LargeListArray):
        raise ValueError(f"column {name!r} must have a list of numbers in each row, found {chunk.type}")
    if chunk.null_count or chunk.values.null_count:
        raise ValueError(f"column {name!r} contains nulls; every row must be a list of numbers without gaps")
    return chunk.offsets.to_numpy().astype(np.int64), chunk.values.to_numpy(zero_copy_only=False)


def token_columns(dataset: Dataset) -> dict[str, RaggedColumn]:
    """Open the token columns of a data set and check that they agree in length.

    Raises:
        ValueError: `input_ids` is missing, or a row's columns differ in length.
    """
    names = [name for name in TOKEN_COLUMNS if name in dataset.column_names]
    if "input_ids" not in names:
        raise ValueError(f"packing needs a tokenized data set with 'input_ids', found columns {dataset.column_names}")
    indices = None if dataset._indices is None else dataset._indices.column(0).to_numpy().astype(np.int64)
    columns = {name: RaggedColumn(name, dataset.data.column(name), indices) for name in names}
    expected = columns["input_ids"].lengths()
    for name, column in columns.items():
        wrong = np.flatnonzero(column.lengths() != expected)
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"row {row}: {name!r} has {column.lengths()[row]} values for {expected[row]} input_ids; "
                "they must be equal"
            )
    return columns


@dataclass(frozen=True)
class RowPlan:
    """Output rows as groups of pieces; `ends[i]` is the number of pieces up to and including row i."""

    pieces: Pieces
    ends: Integers

    def batches(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows with about `TOKENS_PER_BATCH` tokens each; one empty range if there are no rows."""
        running = np.concatenate([[0], np.cumsum(self.pieces.length)])[self.ends]
        first = 0
        while first < len(self.ends) or first == 0:
            done = running[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(running, done + TOKENS_PER_BATCH, side="right")))
            yield first, min(last, len(self.ends))
            first = last

    def part(self, first: int, last: int) -> RowPlan:
        """Return the plan of rows `first` to `last` (exclusive)."""
        before = int(self.ends[first - 1]) if first else 0
        ends = self.ends[first:last] - before
        return RowPlan(self.pieces[before : before + (int(ends[-1]) if len(ends) else 0)], ends)


def materialize(
    dataset: Dataset, plan: RowPlan, carry: Dataset | None = None, columns: Columns | None = None
) -> Dataset:
    """Create the data set of a plan's rows.

    It is in memory if the source is, otherwise in a temporary file that is deleted when the process ends.

    Args:
        dataset: The source, with token columns.
        plan: The rows to create.
        carry: Further columns to keep, one row per output row. None if rows are packed; then `seq_lengths` (lengths of
            the row's pieces) is added, and `labels` if the source has none.
        columns: Columns of the documents of the plan; None = those of the source.
    """
    return _store(row_tables(columns or token_columns(dataset), plan, carry), in_memory=not dataset.cache_files)


def row_tables(columns: Columns, plan: RowPlan, carry: Dataset | None = None) -> Iterator[pa.Table]:
    """Yield the rows of a plan as Arrow tables of about `TOKENS_PER_BATCH` tokens each; see `materialize`."""
    return (_batch_table(columns, plan, batch, carry) for batch in plan.batches())


def _batch_table(columns: Columns, plan: RowPlan, batch: tuple[int, int], carry: Dataset | None) -> pa.Table:
    rows = plan.part(*batch)
    counts = np.concatenate([[0], rows.ends])
    offsets = np.concatenate([[0], np.cumsum(rows.pieces.length)])[counts]
    arrays: dict[str, Any] = {
        name: list_array(offsets, column.gather(rows.pieces, COLUMN_TYPES.get(name, np.int32)))
        for name, column in columns.items()
    }
    if carry is not None:
        further = carry.with_format("arrow")[batch[0] : batch[1]]
        return pa.table({**{name: further.column(name) for name in carry.column_names}, **arrays})
    arrays.setdefault("labels", arrays["input_ids"])
    return pa.table({**arrays, "seq_lengths": list_array(counts, rows.pieces.length.astype(np.int32))})


def list_array(offsets: Integers, values: np.ndarray[Any, Any]) -> pa.ListArray:
    """Return an Arrow array of lists; `offsets` are `(num_lists + 1,)` borders in `values`."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _store(tables: Iterator[pa.Table], in_memory: bool) -> Dataset:
    """Store tables as a data set whose fingerprint depends only on its content, so that equal runs save equal files."""
    hasher = Hasher()
    if in_memory:
        kept = pa.concat_tables([hash_table(table, hasher) for table in tables])
        return Dataset(InMemoryTable(kept), fingerprint=hasher.hexdigest())
    folder = get_temporary_cache_files_directory()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="rows-", suffix=".arrow", delete=False) as file:
        first = hash_table(next(tables), hasher)
        with pa.ipc.new_stream(file, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(hash_table(table, hasher))
    return Dataset(MemoryMappedTable.from_file(file.name), fingerprint=hasher.hexdigest())


def hash_table(table: pa.Table, hasher: Hasher) -> pa.Table:
    """Update a fingerprint with the content of a table; return the table."""
    for name in table.column_names:
        hasher.update(name)
        for chunk in table.column(name).chunks:
            for buffer in chunk.buffers():
                hasher.update(b"" if buffer is None else bytes(buffer))
    return table


def write_rows(tables: Iterator[pa.Table], folder: Path) -> None:
    """Write tables as one data set whose fingerprint depends only on their content.

    Only one table is in memory at a time.

    Args:
        tables: One or more tables with the same schema.
        folder: Folder to create.
    """
    first = next(tables)
    schema = Features.from_arrow_schema(first.schema).arrow_schema
    hasher = Hasher()
    folder.mkdir(parents=True)
    names: list[str] = []
    table: pa.Table | None = hash_table(first, hasher)
    while table is not None:
        name, num_bytes = f"part-{len(names):05d}.arrow", 0
        names.append(name)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while table is not None and (num_bytes == 0 or num_bytes + table.nbytes <= MAX_FILE_BYTES):
                writer.write_table(table.cast(schema))
                num_bytes += table.nbytes
                following = next(tables, None)
                table = None if following is None else hash_table(following, hasher)
    _describe(folder, names, schema, hasher.hexdigest())


def _describe(folder: Path, names: list[str], schema: pa.Schema, fingerprint: str) -> None:
    """Write the files that describe the data set, by letting `datasets` save an empty one and adding the file names."""
    Dataset(InMemoryTable(schema.empty_table()), fingerprint=fingerprint).save_to_disk(str(folder / "empty"))
    state = json.loads((folder / "empty" / "state.json").read_text(encoding="utf-8"))
    final = [f"data-{number:05d}-of-{len(names):05d}.arrow" for number in range(len(names))]
    state["_data_files"] = [{"filename": name} for name in final]
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "empty" / "dataset_info.json").replace(folder / "dataset_info.json")
    for name, better in zip(names, final, strict=True):
        (folder / name).replace(folder / better)
    for path in (folder / "empty").iterdir():
        path.unlink()
    (folder / "empty").rmdir()
