"""A stage's output folder that is replaced as a whole, and the ledger of rows that something was done to."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Self

NUM_EXAMPLES = 3


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of `path` on success and vanishes on failure.

    What was at `path` before stays untouched until then, so that a failed run destroys no earlier result.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


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


class Action(StrEnum):
    """What was done to a row that stands in the ledger."""

    DROP = "drop"
    OMIT = "omit"
    """Left out because params.yaml wants fewer rows: nothing is wrong with it."""
    REPAIR = "repair"
    WARN = "warn"
    FAIL = "fail"


LEAVES_OUT = (Action.DROP, Action.OMIT)


class Ledger(JsonlWriter):
    """Every row that a stage leaves out, mends or warns of, with the reason; remembers the first ids of each reason.

    Args:
        path: JSON lines file.
        stage: The stage that writes it.
    """

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path)
        self._stage = stage
        self.counts: defaultdict[Action, Counter[str]] = defaultdict(Counter)
        self._examples: defaultdict[tuple[Action, str], list[str]] = defaultdict(list)

    def enter(self, row_id: str, reason: str, detail: str, action: Action = Action.DROP) -> None:
        """Enter one row; it may have several entries, of which one at most leaves it out.

        Args:
            row_id: Where the row is, `file:line`.
            reason: Short code.
            detail: What was found.
            action: What was done.
        """
        self.write({"id": row_id, "stage": self._stage, "reason": reason, "action": action.value, "detail": detail})
        self.counts[action][reason] += 1
        if len(self._examples[action, reason]) < NUM_EXAMPLES:
            self._examples[action, reason].append(f"{row_id} ({detail})")

    @property
    def num_left_out(self) -> int:
        """How many rows it leaves out."""
        return sum(self.counts[action].total() for action in LEAVES_OUT)

    def count(self, reason: str) -> int:
        """How many rows have something, whatever was done about it."""
        return sum(counts[reason] for counts in self.counts.values())

    def summary(self, *actions: Action, reason: str | None = None) -> str:
        """Reasons, most frequent first, with the first ids of each; of rows left out, of some actions or one reason."""
        chosen = [
            (count, name, action)
            for action in actions or (LEAVES_OUT if reason is None else Action)
            for name, count in self.counts[action].items()
            if reason in (None, name)
        ]
        return "; ".join(
            f"{name} {count} times, first {', '.join(self._examples[action, name])}"
            for count, name, action in sorted(chosen, key=lambda item: -item[0])
        )
