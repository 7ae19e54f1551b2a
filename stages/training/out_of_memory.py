"""Out of memory: the training goes on from its last checkpoint with the same updates, computed in smaller parts."""

from __future__ import annotations

from typing import Any

from stages.checkout.artifacts import read_json, write_json
from stages.params.schema import TrainSection
from stages.training.checkpoints import TrainingState

EVENTS = "out_of_memory.json"
"""With the checkpoints: a training that is killed later need not find out again what fits."""


class OutOfMemory(ValueError):
    """The device's memory did not suffice; another attempt in smaller parts may succeed."""


def fitted(section: TrainSection, state: TrainingState) -> TrainSection:
    """The section with as many rows a forward pass as have been found to fit; an update has as many rows as before."""
    found = events(state)
    rows = section.per_device_train_batch_size
    while found and rows > found[-1]["rows"]:
        rows = fewer(rows)
    passes = section.gradient_accumulation_steps * section.per_device_train_batch_size // rows
    return section.model_copy(update={"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes})


def fewer(rows: int) -> int:
    """Half the rows a forward pass, or the next smaller number of which whole passes make up the same rows."""
    return next(number for number in range(rows // 2, 0, -1) if rows % number == 0)


def events(state: TrainingState) -> list[dict[str, Any]]:
    """How often this training ran out of memory, and what was done."""
    file = state.folder / EVENTS
    return list(read_json(file)) if file.exists() else []


def figures(section: TrainSection, state: TrainingState) -> dict[str, int]:
    """How often memory did not suffice, and, where it did not, how many rows a forward pass had in the end."""
    found = events(state)
    rows = {"rows_a_pass": fitted(section, state).per_device_train_batch_size} if found else {}
    return {"out_of_memory": len(found), **rows}


def history(state: TrainingState) -> str:
    """All of it in words; empty when memory sufficed."""
    return "; ".join(f"{event['problem']}, {event['rows']} from there" for event in events(state))


def make_smaller(section: TrainSection, state: TrainingState, problem: str) -> None:
    """Let the next attempt of this training compute its updates in smaller parts.

    Args:
        section: As params.yaml states it.
        state: The training's folder.
        problem: Where it ran out of memory.

    Raises:
        ValueError: That is not allowed or not possible; names the ways out.
    """
    other_ways = "set train.gradient_checkpointing: true, or lower pack.max_length"
    rows = fitted(section, state).per_device_train_batch_size
    if rows == 1:
        raise ValueError(f"{problem}; it can't be less than one row: {other_ways}")
    if section.on_oom == "fail":
        raise ValueError(
            f"{problem}; set train.on_oom: halve, lower train.per_device_train_batch_size (and raise "
            f"gradient_accumulation_steps as much), {other_ways}"
        )
    if section.launch.machines > 1:
        raise ValueError(
            f"{problem}; train.on_oom: halve works on one machine only: lower train.per_device_train_batch_size and "
            "raise gradient_accumulation_steps as much; training goes on from the last checkpoint"
        )
    less = fewer(rows)
    state.folder.mkdir(parents=True, exist_ok=True)
    write_json(state.folder / EVENTS, [*events(state), {"problem": problem, "rows": less}])
    print(
        f"{problem}; going on from the last checkpoint with {less}, {rows // less} times as many an update", flush=True
    )
