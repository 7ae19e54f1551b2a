"""Long JSON lines files in stretches of bytes, worked on by several processes; results come in the file's order.

Stretches of whole lines of a JSON lines file, and what work on them looks like.

Shards worked on by actors of Ray, on this machine or on a cluster; results come in the file's order.
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
        workers: Processes of this machine, or actors of Ray (`stages.shards.shards`).

    Returns:
        The results in the order of the shards, whoever does the work; few of them wait at a time.

    Raises:
        ValueError: What the work raised on the first shard that failed.
        OSError: A process was killed.
    """
    if workers == "ray":
        from stages.shards.shards import run_on_ray  # an optional package

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


WAITING_AN_ACTOR = 2


class ShardActor:
    """Does one kind of work in a process of Ray.

    Args:
        work: What to do; its `build` is called once.
    """

    def __init__(self, work: Work[Any]) -> None:
        keep_to_one_thread()
        self._do: Callable[[Shard], Any] = work.build()

    def run(self, shard: Shard) -> Any:
        """Do it on one shard."""
        return self._do(shard)


def run_on_ray(work: Work[Any], shards: Sequence[Shard], num_proc: int) -> Iterator[Any]:
    """Do the work on every shard, each `num_proc`-th one in the same actor.

    Args:
        work: What to do.
        shards: What to do it on.
        num_proc: Actors at most, one processor each. Where RAY_ADDRESS names a cluster they are spread over its
            machines; otherwise Ray starts here, for this call.

    Returns:
        The results in the order of the shards; few of them wait at a time.

    Raises:
        ValueError: Ray is not installed, or what the work raised on the first shard that failed.
        OSError: The cluster can't be reached or has no processor, or an actor was killed.
    """
    if not shards:
        return
    ray = _ray()
    wanted = min(num_proc, len(shards))
    started = not ray.is_initialized()
    if started:
        _start(ray, wanted)
    try:
        yield from _results(ray, work, shards, min(wanted, _num_processors(ray)))
    except ray.exceptions.RayTaskError as error:
        # an error of the work itself: Ray wraps it in its own, with a traceback of the other process
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    except ray.exceptions.RayActorError as error:
        raise OSError(f"an actor of Ray was killed, perhaps for want of memory: lower num_proc ({error})") from error
    finally:
        if started:
            ray.shutdown()


def _results(ray: Any, work: Work[Any], shards: Sequence[Shard], num_actors: int) -> Iterator[Any]:
    remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(ShardActor)
    actors = [remote.remote(work) for _ in range(num_actors)]
    waiting: deque[Any] = deque()
    try:
        for number, shard in enumerate(shards):
            waiting.append(actors[number % num_actors].run.remote(shard))
            if len(waiting) >= WAITING_AN_ACTOR * num_actors:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for actor in actors:
            ray.kill(actor)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "params.yaml states workers: ray, and Ray is not installed: pip install '.[ray]', or state processes"
        ) from error
    return ray


def _start(ray: Any, num_proc: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    # a cluster states its own processors; a Ray of our own has as many as are asked for
    options: dict[str, Any] = {} if address else {"num_cpus": num_proc, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError) as error:
        raise OSError(f"Ray at RAY_ADDRESS {address!r} can't be reached: {error}") from error


def _num_processors(ray: Any) -> int:
    found = int(ray.cluster_resources().get("CPU", 0))
    if found < 1:
        raise OSError("the cluster of Ray has no processor (CPU) to give: start its nodes with --num-cpus")
    return found
