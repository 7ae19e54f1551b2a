"""Long JSON lines files in stretches of bytes, worked on by several processes; results come in the file's order."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

Result = TypeVar("Result", covariant=True)

SHARD_BYTES = 8 << 20
SHARDS_A_PROCESS = 2
"""A process takes seconds to start: fewer shards than this are done sooner without it."""


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


def run_shards(work: Work[Result], shards: Sequence[Shard], num_proc: int) -> Iterator[Result]:
    """Do the work on every shard.

    Args:
        work: What to do.
        shards: What to do it on.
        num_proc: Processes at most; 1 = in this one.

    Returns:
        The results in the order of the shards, whatever `num_proc` is; few of them wait at a time.

    Raises:
        ValueError: What the work raised on the first shard that failed.
        OSError: A process was killed.
    """
    num_processes = min(num_proc, len(shards) // SHARDS_A_PROCESS)
    if num_processes <= 1:
        yield from map(work.build(), shards)
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and not the threads
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_keep_to_one_thread)
    try:
        for shard in shards:
            waiting.append(pool.submit(_run, work, shard))
            if len(waiting) >= 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(
            f"one of {num_processes} processes was killed, perhaps for want of memory: lower num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _keep_to_one_thread() -> None:
    """Processes that each use all cores slow each other down."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@functools.lru_cache(maxsize=1)
def _built(work: Work[Any]) -> Callable[[Shard], Any]:
    return work.build()


def _run(work: Any, shard: Shard) -> Any:
    return _built(work)(shard)
