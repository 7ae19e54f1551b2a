"""Stretches of whole lines of a JSON lines file, and what work on them looks like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

Result = TypeVar("Result", covariant=True)

SHARD_BYTES = 8 << 20


class Shard(NamedTuple):
    """Whole lines of a file: bytes `start` to `end`."""

    path: Path
    start: int
    end: int

    def rows(self) -> Iterator[dict[str, Any]]:
        """The JSON objects in it, one a line."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.end - self.start).split(b"\n")
        return (json.loads(line) for line in lines if line)


class Work(Protocol[Result]):
    """What is done with every shard; hashable and small, since each process gets a copy."""

    def build(self) -> Callable[[Shard], Result]:
        """Load what the work needs, once a process."""


def shards_of(path: Path) -> list[Shard]:
    """Divide a file at the line ends next to multiples of `SHARD_BYTES`."""
    shards, start, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while start < size:
            file.seek(min(size, start + SHARD_BYTES))
            file.readline()
            shards.append(Shard(path, start, file.tell()))
            start = file.tell()
    return shards


def keep_to_one_thread() -> None:
    """Processes that each use all cores slow each other down."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
