"""Reading and writing of the pipeline's small files. A file is written completely or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import IO, Any, Self

from sft.folders import partial_file


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one, so that no reader sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented.

    Raises:
        ValueError: The value contains NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON value."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with partial_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one per line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def code_digest(*rooms: str) -> str:
    """Return the SHA-256 of the modules in some rooms, such as `sft/data`."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[2]
    for path in sorted(path for room in rooms for path in (root / room).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def fresh_folder(path: Path) -> Path:
    """Replace whatever is at `path` by an empty folder and return it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


class JsonlWriter:
    """Writer of JSON lines that counts rows and bytes, and can read and remove rows that it wrote.

    Args:
        path: File to write; an existing file is replaced.
        kept: Bytes of an existing file that are kept, to be appended to.
    """

    def __init__(self, path: Path, kept: int = 0) -> None:
        self.path = path
        self.num_rows = 0
        self.num_bytes = kept
        if kept:
            if not path.is_file() or path.stat().st_size < kept:
                raise ValueError(f"{path}: {kept} bytes of it are needed and not there; delete {path.parent.parent}")
            os.truncate(path, kept)
        self._file: IO[bytes] = path.open("a+b" if kept else "w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def flush(self) -> None:
        """Write what is buffered to the file."""
        self._file.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
        self._file.write(line)
        self.num_rows += 1
        self.num_bytes += len(line)

    def write_lines(self, lines: Sequence[str]) -> None:
        """Append rows that are already JSON texts."""
        encoded = [f"{line}\n".encode() for line in lines]
        self._file.writelines(encoded)
        self.num_rows += len(encoded)
        self.num_bytes += sum(map(len, encoded))

    def read(self, offset: int) -> dict[str, Any]:
        """Return a row that was written.

        Args:
            offset: Byte at which the row begins.
        """
        self._file.seek(offset)
        row = json.loads(self._file.readline())
        self._file.seek(0, os.SEEK_END)
        return dict(row)

    def rearrange(self, order: Sequence[int]) -> None:
        """Replace the rows by some of them in another order; repeated ones get ids of their own, ending in `*1`, `*2`.

        Args:
            order: Numbers of rows, from 0.
        """
        self._file.close()
        seen: Counter[int] = Counter()
        with partial_file(self.path) as partial, self.path.open("rb") as lines, partial.open("wb") as kept:
            starts = [0, *itertools.accumulate(map(len, lines))]
            for number in order:
                lines.seek(starts[number])
                line = lines.readline()
                if seen[number]:
                    row = json.loads(line)
                    row["id"] = f"{row['id']}*{seen[number]}"
                    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
                seen[number] += 1
                kept.write(line)
            self.num_bytes = kept.tell()
        self.num_rows = len(order)
        self._file = self.path.open("a+b")

    def remove(self, rows: Set[int]) -> None:
        """Remove rows.

        Args:
            rows: Their numbers, from 0.
        """
        self._file.close()
        with partial_file(self.path) as partial, self.path.open("rb") as lines, partial.open("wb") as kept:
            kept.writelines(line for number, line in enumerate(lines) if number not in rows)
            self.num_bytes = kept.tell()
        self.num_rows -= len(rows)
        self._file = self.path.open("a+b")
