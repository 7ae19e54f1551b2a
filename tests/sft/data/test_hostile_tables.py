"""Arrow and Parquet files from elsewhere are read or refused in one message: they end no process, fill no memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft.data.source_row import SourceError
from sft.data.sources import read_rows
from sft.untrusted import tables
from sft.untrusted.tables import TableError, check_table, small_batches


def arrow_file(path: Path, batch: pa.RecordBatch, options: Any = None) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return path


def said(path: Path) -> str:
    with pytest.raises(SourceError) as raised:
        list(read_rows(path))
    return str(raised.value)


def test_an_arrow_file_whose_offsets_lead_out_of_its_data_is_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 1 << 30, 3)))
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc"))
    path = arrow_file(tmp_path / "a.arrow", pa.record_batch({"text": texts}))
    assert path.stat().st_size < 1000
    assert "a.arrow: damaged or incomplete Arrow file: In column 0: Invalid: " in said(path)


def test_indices_of_a_dictionary_beyond_its_end_are_refused(tmp_path: Path) -> None:
    indices = pa.array([0, 1 << 30], pa.int32())
    texts = pa.DictionaryArray.from_arrays(indices, pa.array(["x"]), safe=False)
    path = arrow_file(tmp_path / "a.arrow", pa.record_batch({"text": texts}))
    assert "a.arrow: damaged or incomplete Arrow file: In column 0: Invalid: Dictionary indices invalid" in said(path)


def test_more_rows_than_a_file_of_its_size_can_have_are_refused(tmp_path: Path) -> None:
    batch = pa.record_batch([pa.NullArray.from_buffers(pa.null(), (1 << 31) - 1, [None])], names=["text"])
    path = arrow_file(tmp_path / "a.arrow", batch)
    assert f"it states {(1 << 31) - 1} rows in {path.stat().st_size} bytes" in said(path)


def test_a_list_of_many_nulls_in_one_row_is_refused(tmp_path: Path) -> None:
    nulls = pa.NullArray.from_buffers(pa.null(), 1 << 30, [None])
    lists = pa.ListArray.from_arrays(pa.array([0, 1 << 30], pa.int32()), nulls)
    path = arrow_file(tmp_path / "a.arrow", pa.record_batch({"text": lists}))
    assert "a row takes 68.7 GB of memory, more than 1.1" in said(path)


def test_a_text_that_many_rows_share_is_converted_in_small_pieces() -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * (4 << 20)]))
    pieces = list(small_batches(pa.record_batch({"text": texts})))
    assert sum(piece.num_rows for piece in pieces) == 1000
    assert max(piece.num_rows for piece in pieces) == 15


@pytest.mark.parametrize(
    "column",
    [
        pa.RunEndEncodedArray.from_arrays(pa.array([1000], pa.int32()), pa.array(["x"])),
        pa.array(["x"], pa.string_view()),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array(["x"])]),
        pa.ListViewArray.from_arrays(pa.array([0], pa.int32()), pa.array([1], pa.int32()), pa.array(["x"])),
        pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array([["x"]])),
    ],
    ids=lambda column: str(column.type)[:10],
)
def test_types_in_which_values_share_bytes_are_refused(tmp_path: Path, column: Any) -> None:
    path = arrow_file(tmp_path / "a.arrow", pa.record_batch([column], names=["text"]))
    assert "the column 'text' is of the type " in said(path)
    assert said(path).endswith(", which is not read; write it plainly")


def test_lists_that_lie_too_deep_in_one_another_are_refused(tmp_path: Path) -> None:
    kind = pa.string()
    for _ in range(51):
        kind = pa.list_(kind)
    path = arrow_file(tmp_path / "a.arrow", pa.record_batch([pa.array([None], kind)], names=["text"]))
    assert said(path).endswith("the column 'text' has more than 50 lists or structs in one another")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = arrow_file(tmp_path / "a.arrow", pa.record_batch([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]))
    assert said(path).endswith("two columns are named 'a'; rename one of them")


def test_a_compressed_batch_larger_than_the_memory_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_child", tables.Child(100 << 20))
    monkeypatch.setattr(tables, "MAX_BYTES", 1 << 30)
    texts = pa.array(["x" * (300 << 20)])
    path = arrow_file(
        tmp_path / "a.arrow", pa.record_batch({"text": texts}), pa.ipc.IpcWriteOptions(compression="zstd")
    )
    assert path.stat().st_size < 100_000
    assert "a.arrow: damaged or incomplete Arrow file: " in said(path)
    assert "memory" in said(path) or "realloc" in said(path) or "malloc" in said(path)


def test_rows_of_a_dictionary_page_that_do_not_fit_are_read_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_child", tables.Child(400 << 20))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["x" * (1 << 20)] * 1000)}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    assert check_table(path, "Parquet") == 32
    assert sum(len(row.columns["text"]) for row in read_rows(path)) == 1000 << 20


def test_a_plain_table_is_read_as_before(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"row {number}"}]} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1000)
    assert check_table(tmp_path / "a.parquet", "Parquet") == 1024
    assert [row.columns for row in read_rows(tmp_path / "a.parquet")] == rows


def test_a_crash_of_the_child_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(b"ARROW1")
    monkeypatch.setattr(tables, "_validate_arrow", crash)
    with pytest.raises(TableError, match=r"reading it ended the process that did it \(SIGSEGV\)"):
        check_table(path, "Arrow")


def crash(path: str) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_damage_at_any_place_is_read_or_refused(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "tag": "x", "image": b"1", "n": [1, 2]}] * 3
    table = pa.Table.from_pylist(rows)
    path = tmp_path / f"a.{suffix}"
    if suffix == "arrow":
        arrow_file(path, table.to_batches()[0])
    else:
        pq.write_table(table, path)
    whole, source = path.read_bytes(), random.Random(0)
    for number in range(150):
        damaged = bytearray(whole)
        for _ in range(source.choice((1, 2, 8))):
            damaged[source.randrange(len(whole))] = source.choice((0, 1, 127, 128, 255, source.randrange(256)))
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(damaged)
        message = path.name
        try:
            list(read_rows(path))
        except SourceError as error:
            message = str(error)
        assert path.name in message
