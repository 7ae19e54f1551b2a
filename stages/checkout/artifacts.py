"""Reading and writing the pipeline's small files; every write is whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and goes when it raises."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented; NaN and infinity are refused since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON value."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with partial_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSON object a line, one at a time."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fresh_folder(path: Path) -> Path:
    """An empty folder in place of whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def progress(done: int, total: int, text: str) -> None:
    """Say how far a stage is; flows turn the line into a progress artifact, a person reads it as it is."""
    print(f"PROGRESS {done}/{total} {text}", flush=True)


class JsonlWriter:
    """Writes one JSON object a line, as rows come; counts them, and knows at which byte the next one begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self.num_bytes = 0
        self._file: IO[bytes] = path.open("w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
        self._file.write(line)
        self.num_rows += 1
        self.num_bytes += len(line)

    def write_lines(self, lines: Sequence[str]) -> None:
        """Append rows that are JSON already."""
        encoded = [f"{line}\n".encode() for line in lines]
        self._file.writelines(encoded)
        self.num_rows += len(encoded)
        self.num_bytes += sum(map(len, encoded))

    def read(self, offset: int) -> dict[str, Any]:
        """A row that was written, by the byte at which it begins."""
        self._file.seek(offset)
        row = json.loads(self._file.readline())
        self._file.seek(0, os.SEEK_END)
        return dict(row)

    def remove(self, rows: Set[int]) -> None:
        """Take out rows by their numbers, from 0."""
        self._file.close()
        partial = self.path.with_name(f".{self.path.name}.partial")
        with self.path.open("rb") as lines, partial.open("wb") as kept:
            kept.writelines(line for number, line in enumerate(lines) if number not in rows)
            self.num_bytes = kept.tell()
        partial.replace(self.path)
        self.num_rows -= len(rows)
        self._file = self.path.open("a+b")
