"""Work on a long JSON lines file in shards of whole lines, by processes of this machine or actors of Ray.

Results come in the order of the file, whoever does the work.
"""

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

from stages.params.schema import Workers

Result = TypeVar("Result", covariant=True)

SHARD_BYTES = 8 << 20

SHARDS_PER_PROCESS = 2
"""A process takes seconds to start, so fewer shards than this per process are done faster without it."""

WAITING_PER_WORKER = 2
"""Shards that are submitted at a time, per process or actor: this bounds the results in memory."""


class Rows(Protocol):
    """Rows that work is done on, in a file or in memory."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""


class Shard(NamedTuple):
    """Whole lines of a file: bytes `start` to `end`."""

    path: Path
    start: int
    end: int

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of the lines."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.end - self.start).split(b"\n")
        return (json.loads(line) for line in lines if line)


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


def count_lines(path: Path) -> int:
    """Return the number of lines of a file."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(SHARD_BYTES), b""))


class Work(Protocol[Result]):
    """What is done with every shard. Must be hashable and small, since each process gets a copy."""

    def build(self) -> Callable[[Shard], Result]:
        """Load what the work needs and return the function that does it; called once per process."""


def run_shards(
    work: Work[Result], shards: Sequence[Shard], num_proc: int, workers: Workers = "processes"
) -> Iterator[Result]:
    """Do the work on every shard.

    Args:
        work: What to do.
        shards: Shards to do it on.
        num_proc: Largest number of processes or actors; with processes, 1 = in this process.
        workers: `processes` of this machine, or `ray` for actors of Ray. Where RAY_ADDRESS names a cluster, actors run
            on its machines; otherwise Ray is started on this machine for this call.

    Yields:
        The results in the order of the shards. Few of them are in memory at a time.

    Raises:
        ValueError: What the work raised on the first shard that failed; or Ray is not installed.
        OSError: A process or actor was killed, or the Ray cluster can't be reached or has no processor.
    """
    if workers == "ray":
        yield from _run_with_ray(work, shards, num_proc)
        return
    num_processes = min(num_proc, len(shards) // SHARDS_PER_PROCESS)
    if num_processes <= 1:
        yield from map(work.build(), shards)
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads, but not the threads
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_use_one_thread)
    try:
        for shard in shards:
            waiting.append(pool.submit(_run, work, shard))
            if len(waiting) >= WAITING_PER_WORKER * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(
            f"one of {num_processes} processes was killed, perhaps because memory ran out: lower num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    """Keep tokenizers to one thread: processes that each use all cores slow each other down."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@functools.lru_cache(maxsize=1)
def _built(work: Work[Any]) -> Callable[[Shard], Any]:
    return work.build()


def _run(work: Any, shard: Shard) -> Any:
    return _built(work)(shard)


class ShardActor:
    """Ray actor that does one kind of work.

    Args:
        work: What to do; its `build` is called once.
    """

    def __init__(self, work: Work[Any]) -> None:
        _use_one_thread()
        self._do: Callable[[Shard], Any] = work.build()

    def run(self, shard: Shard) -> Any:
        """Do the work on one shard."""
        return self._do(shard)


def _run_with_ray(work: Work[Any], shards: Sequence[Shard], num_proc: int) -> Iterator[Any]:
    if not shards:
        return
    ray = _import_ray()
    wanted = min(num_proc, len(shards))
    started = not ray.is_initialized()
    if started:
        _start_ray(ray, wanted)
    try:
        yield from _run_actors(ray, work, shards, min(wanted, _num_processors(ray)))
    except ray.exceptions.RayTaskError as error:
        # Ray wraps an error of the work in its own error, with a traceback of the other process.
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    except ray.exceptions.RayActorError as error:
        raise OSError(
            f"an actor of Ray was killed, perhaps because memory ran out: lower num_proc ({error})"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "params.yaml states workers: ray, and Ray is not installed: pip install '.[ray]', or state processes"
        ) from error
    return ray


def _start_ray(ray: Any, num_proc: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    # A cluster states its own number of processors; a Ray started here gets as many as there are actors.
    options: dict[str, Any] = {} if address else {"num_cpus": num_proc, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError) as error:
        raise OSError(f"Ray at RAY_ADDRESS {address!r} can't be reached: {error}") from error


def _num_processors(ray: Any) -> int:
    found = int(ray.cluster_resources().get("CPU", 0))
    if found < 1:
        raise OSError("the Ray cluster has no processor (CPU): start its nodes with --num-cpus")
    return found


def _run_actors(ray: Any, work: Work[Any], shards: Sequence[Shard], num_actors: int) -> Iterator[Any]:
    """Do the work on every shard, each `num_actors`-th one in the same actor; an actor takes one processor."""
    remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(ShardActor)
    actors = [remote.remote(work) for _ in range(num_actors)]
    waiting: deque[Any] = deque()
    try:
        for number, shard in enumerate(shards):
            waiting.append(actors[number % num_actors].run.remote(shard))
            if len(waiting) >= WAITING_PER_WORKER * num_actors:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for actor in actors:
            ray.kill(actor)
