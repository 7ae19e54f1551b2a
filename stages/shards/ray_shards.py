"""Shards worked on by actors of Ray, on this machine or on a cluster; results come in the file's order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stages.shards.shard import Shard, Work, keep_to_one_thread

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
