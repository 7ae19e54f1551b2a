"""Long JSON lines files in stretches of bytes, worked on by several processes; results come in the file's order."""

from __future__ import annotations

import functools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from stages.params.schema import Workers
from stages.shards.shard import Result, Shard, Work, keep_to_one_thread

SHARDS_A_PROCESS = 2
"""A process takes seconds to start: fewer shards than this are done sooner without it."""


def run_shards(
    work: Work[Result], shards: Sequence[Shard], num_proc: int, workers: Workers = "processes"
) -> Iterator[Result]:
    """Do the work on every shard.

    Args:
        work: What to do.
        shards: What to do it on.
        num_proc: Processes at most; 1 = in this one.
        workers: Processes of this machine, or actors of Ray (`stages.shards.ray_shards`).

    Returns:
        The results in the order of the shards, whoever does the work; few of them wait at a time.

    Raises:
        ValueError: What the work raised on the first shard that failed.
        OSError: A process was killed.
    """
    if workers == "ray":
        from stages.shards.ray_shards import run_on_ray  # an optional package

        yield from run_on_ray(work, shards, num_proc)
        return
    num_processes = min(num_proc, len(shards) // SHARDS_A_PROCESS)
    if num_processes <= 1:
        yield from map(work.build(), shards)
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and not the threads
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=keep_to_one_thread)
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


@functools.lru_cache(maxsize=1)
def _built(work: Work[Any]) -> Callable[[Shard], Any]:
    return work.build()


def _run(work: Any, shard: Shard) -> Any:
    return _built(work)(shard)
