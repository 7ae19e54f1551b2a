"""JSON and CSV files from elsewhere are read, or refused in time with one message."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import pytest

from sft.data import text_reader
from sft.data.source_row import SourceError
from sft.data.sources import read_rows


def said(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SourceError) as raised:
        list(read_rows(path))
    assert len(str(raised.value)) < 1000
    return str(raised.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("depth", [101, 400, 100_000])
def test_values_too_deep_for_the_steps_after_reading_are_refused(tmp_path: Path, suffix: str, depth: int) -> None:
    path = tmp_path / f"a.{suffix}"
    assert "lie too deep in one another to be read" in said(path, '{"text": ' + "[" * depth + "]" * depth + "}\n")


def test_a_row_of_ordinary_depth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 98 + "]" * 98 + "}\n", encoding="utf-8")
    assert len(list(read_rows(path))) == 1


def test_many_keys_of_which_the_last_stands_twice_are_refused_at_once(tmp_path: Path) -> None:
    keys = ",".join(f'"{number}":1' for number in range(200_000))
    started = time.monotonic()
    assert "the key '199999' stands twice" in said(tmp_path / "a.jsonl", "{" + keys + ',"199999":1}\n')
    assert time.monotonic() - started < 30


def test_many_columns_of_which_the_last_stands_twice_are_refused_at_once(tmp_path: Path) -> None:
    names = ",".join(map(str, range(200_000)))
    started = time.monotonic()
    assert "two columns are named '199999'" in said(tmp_path / "a.csv", f"{names},199999\n1\n")
    assert time.monotonic() - started < 30


def test_a_row_of_csv_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "MAX_LINE", 1000)
    content = 'text\nx\n"' + "y" * 90 + "\n" + ("z" * 90 + "\n") * 50
    assert "a.csv:13: a row of more than 0 MiB; a quote may be missing" in said(tmp_path / "a.csv", content)


def test_a_field_longer_than_the_limit_of_the_csv_module_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 300_000}\n", encoding="utf-8")
    assert [len(row.columns["text"]) for row in read_rows(tmp_path / "a.csv")] == [300_000]


def test_a_compressed_file_of_several_parts_that_grows_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_reader, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * (8 << 20)) * 4)
    with pytest.raises(SourceError, match="unpacked, it is more than 200 times as large as the compressed file"):
        list(read_rows(path))
