"""Check of the memory that training, merge and evaluation need against that of the machine, by the model's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.params.schema import ENGINES, Params
from stages.preflight.checkpoint import Outline
from stages.preflight.findings import Problem
from stages.recipes.offline import BYTES, CONTEXT_GB, Shape, estimate, shape_of

GB = 1e9

NEAR = 0.85
"""Share of the memory from which on a need is a warning: the estimate is not exact, and other programs run, too."""

WORTH = 0.95
"""A value is named as a way out if it lowers the need at least to this share."""

PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose state is on the device in full; that of others may be paged, rounded or factored."""


@dataclass(frozen=True)
class Room:
    """Memory for one process.

    Args:
        name: What has it, for messages.
        size: GB for one process.
        spare: GB into which a process can overflow, slowly.
    """

    name: str
    size: float
    spare: float = 0.0


@dataclass(frozen=True)
class Need:
    """What a stage needs.

    Args:
        what: What needs it, for messages.
        key: Place in params.yaml.
        total: GB that it needs about.
        certain: GB without which it can't run.
        parts: What they are for, for messages; empty if there is one part.
        ways_out: Values that need less, each with its GB.
    """

    what: str
    key: str
    total: float
    certain: float
    parts: str
    ways_out: list[tuple[str, float]]


def find_shape(params: Params, root: Path, folder: Path | None, outline: Outline | None) -> Shape | None:
    """Return the shape of the base model: by its files, its config.json or its name; None if it is not known.

    Args:
        params: Values of params.yaml.
        root: The checkout.
        folder: Folder of the base model; None if it is not on this machine.
        outline: What its files say; None if there are none.
    """
    counted = outline.num_weights if outline is not None else 0
    try:
        shape = shape_of(params.model.name_or_path if folder is None else str(folder.absolute()), root)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):  # a config.json with other names for the sizes
        return Shape(counted, counted, 0, 0, 0, 0) if counted else None
    return replace(shape, total=counted) if counted else shape


def check_memory(params: Params, shape: Shape, outline: Outline | None, host: Room, device: Room) -> Iterator[Problem]:
    """Yield stages that need more memory than there is (an error if that is certain), or nearly as much.

    Args:
        params: Values of params.yaml.
        shape: The base model.
        outline: What its files say; None if they are not here.
        host: Main memory.
        device: Memory of the device that trains and evaluates.
    """
    found = [(_training(params, shape, device), device)]
    if outline is not None and outline.file_sizes:
        found.append((_merge(params, outline), host))
    found.append((_evaluation(params, shape), device))
    for need, room in found:
        is_error = need.certain > room.size + room.spare
        if is_error or need.total > NEAR * room.size:
            yield Problem(need.key, _describe(need, room, is_error=is_error), is_error=is_error)


def _training(params: Params, shape: Shape, device: Room) -> Need:
    values = params.model_dump()
    found = estimate(values, shape)
    certain, train = found.memory["weights"], params.train
    if train.method == "full" and train.optim in PLAIN_OPTIMIZERS and not train.parameter_groups:
        certain += found.memory["gradients"] + found.memory["optimizer"]
    if train.launch.engine not in ENGINES:  # a file of accelerate may move anything into main memory
        certain = 0.0
    ways = []
    for key, value in _alternatives(params):
        needed = estimate(_with(values, key, value), shape).peak
        if needed <= WORTH * found.peak:
            ways.append((key, f"{key}: {str(value).lower() if value is True else value}", needed))
    ways.sort(key=lambda way: way[2])
    parts = ", ".join(f"{part} {size:.1f}" for part, size in found.memory.items() if size >= 0.05)
    key = ways[0][0] if ways else "model.name_or_path"
    return Need("the training", key, found.peak, certain, parts, [(text, needed) for _, text, needed in ways])


def _alternatives(params: Params) -> Iterator[tuple[str, Any]]:
    """Yield keys and values that need less memory, as far as `estimate` knows of them."""
    train, launch = params.train, params.train.launch
    if train.per_device_train_batch_size > 1:
        yield "train.per_device_train_batch_size", 1
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing", True
    if params.pack.max_length >= 2:
        yield "pack.max_length", params.pack.max_length // 2
    if params.model.dtype == "float32":
        yield "model.dtype", "bfloat16"
    if train.method == "full":
        yield "train.method", "lora"
    if train.method != "qlora":
        yield "train.method", "qlora"
    if launch.processes > 1 and launch.engine in ("ddp", "deepspeed_zero2"):
        yield "train.launch.engine", "fsdp2"


def _with(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested values with another value at a key such as `train.launch.engine`."""
    first, _, rest = key.partition(".")
    return {**values, first: _with(values[first], rest, value) if rest else value}


def _merge(params: Params, outline: Outline) -> Need:
    """Return the need of `merge`, which holds the weights of one file at a time (`sft.export.merge_by_file`)."""
    size = BYTES[params.merge.dtype]
    largest = max(outline.file_sizes) / GB
    ways = [] if size == 2 else [("merge.dtype: bfloat16", 2 * largest + CONTEXT_GB)]
    return Need("the merge", "merge.dtype", size * largest + CONTEXT_GB, size * largest, "", ways)


def _evaluation(params: Params, shape: Shape) -> Need:
    """Return the need of `evaluate`, which loads the models one after the other, none of them in 4 bit by itself."""
    sizes = {"model.dtype": BYTES[params.model.dtype], "merge.dtype": BYTES[params.merge.dtype]}
    key = max(sizes, key=lambda name: (sizes[name], name == "merge.dtype"))
    weights = shape.total * sizes[key] / GB
    ways = [] if sizes[key] == 2 else [(f"{key}: bfloat16", weights / 2 + CONTEXT_GB)]
    what = "the evaluation of the " + ("merged model" if key == "merge.dtype" else "base model")
    return Need(what, key, weights + CONTEXT_GB, weights, "", ways)


def _describe(need: Need, room: Room, *, is_error: bool) -> str:
    parts = f" ({need.parts})" if need.parts else ""
    there = f"{room.name} has {room.size:.1f} GB"
    text = f"{need.what} needs about {need.total:.1f} GB{parts}, and {there}"
    if is_error:
        text = f"{need.what} needs at least {need.certain:.1f} GB, about {need.total:.1f} GB{parts}, and {there}"
    fitting = [(way, size) for way, size in need.ways_out if size <= room.size]
    if fitting:
        return text + "; ways out: " + ", ".join(f"{way} ({size:.1f} GB)" for way, size in fitting)
    if not need.ways_out:
        return text + "; choose a smaller model"
    more = ", ".join(f"{way} ({size:.1f} GB)" for way, size in need.ways_out)
    return text + f"; none of these is enough alone: {more}; combine them or choose a smaller model"


def rooms(gpus: tuple[int, ...], memory: int, swap: int, processes: int) -> tuple[Room, Room]:
    """Return main memory as a whole, and the memory of the device for one process.

    Args:
        gpus: Bytes of memory of each GPU.
        memory: Bytes of main memory.
        swap: Bytes of swap space.
        processes: Processes of the training on this machine.
    """
    host = Room("this machine", memory / GB, swap / GB)
    if gpus:
        return host, Room("the GPU", min(gpus) / GB)
    if processes == 1:
        return host, host
    return host, Room(f"each of {processes} processes of this machine", host.size / processes, host.spare / processes)
