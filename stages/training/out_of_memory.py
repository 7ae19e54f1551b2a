"""Recovery from out-of-memory errors: smaller forward passes, and more of them per update.

The training continues from its last checkpoint. An update has as many rows as before, so its gradient is the same up to
rounding.
"""

from __future__ import annotations

from typing import Any

from stages.checkout.artifacts import read_json, write_json
from stages.params.schema import TrainSection
from stages.training.checkpoints import TrainingState

EVENTS = "out_of_memory.json"
"""File with the events, next to the checkpoints.

A resumed training starts with the number of rows that was chosen after the last of them.
"""


class OutOfMemory(ValueError):
    """A device ran out of memory; another attempt with smaller forward passes may succeed."""


def section_that_fits(section: TrainSection, state: TrainingState) -> TrainSection:
    """Return the section with at most the rows per forward pass chosen after the last out-of-memory error.

    The number of rows per update stays the same. It is not known yet whether the smaller forward passes fit.
    """
    found = read_events(state)
    rows = section.per_device_train_batch_size
    while found and rows > found[-1]["rows"]:
        rows = fewer_rows(rows)
    passes = section.gradient_accumulation_steps * section.per_device_train_batch_size // rows
    return section.model_copy(update={"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes})


def fewer_rows(rows: int) -> int:
    """Return the largest divisor of `rows` that is at most half of it: the rows of the next, smaller forward pass."""
    return next(number for number in range(rows // 2, 0, -1) if rows % number == 0)


def read_events(state: TrainingState) -> list[dict[str, Any]]:
    """Return an entry for each time that this training ran out of memory: the `problem`, and the `rows` after it."""
    file = state.folder / EVENTS
    return list(read_json(file)) if file.exists() else []


def memory_figures(section: TrainSection, state: TrainingState) -> dict[str, int]:
    """Return how often the training ran out of memory and, if it did, the rows per forward pass at its end."""
    found = read_events(state)
    rows = {"rows_a_pass": section_that_fits(section, state).per_device_train_batch_size} if found else {}
    return {"out_of_memory": len(found), **rows}


def describe_events(state: TrainingState) -> str:
    """Return the out-of-memory events as one line of text; empty if there were none."""
    return "; ".join(f"{event['problem']}, {event['rows']} from there" for event in read_events(state))


def make_smaller(section: TrainSection, state: TrainingState, problem: str) -> None:
    """Make the next attempt of this training use fewer rows per forward pass.

    Args:
        section: Section `train` of params.yaml.
        state: Folder of the training's checkpoints.
        problem: In which step it ran out of memory, and with how many rows.

    Raises:
        ValueError: train.on_oom forbids it, one row does not fit, or there are several machines.
    """
    other_ways = "set train.gradient_checkpointing: true, or lower pack.max_length"
    rows = section_that_fits(section, state).per_device_train_batch_size
    if rows == 1:
        raise ValueError(f"{problem}; a forward pass can't have fewer than one row: {other_ways}")
    if section.on_oom == "fail":
        raise ValueError(
            f"{problem}; set train.on_oom: halve, lower train.per_device_train_batch_size (and raise "
            f"gradient_accumulation_steps by the same factor), {other_ways}"
        )
    if section.launch.machines > 1:
        raise ValueError(
            f"{problem}; train.on_oom: halve works on one machine only: lower train.per_device_train_batch_size and "
            "raise gradient_accumulation_steps by the same factor; training then continues from the last checkpoint"
        )
    less = fewer_rows(rows)
    state.folder.mkdir(parents=True, exist_ok=True)
    write_json(state.folder / EVENTS, [*read_events(state), {"problem": problem, "rows": less}])
    print(
        f"{problem}; continuing from the last checkpoint with {less} row{'s' * (less != 1)} per forward pass and "
        f"{rows // less} times as many passes per update",
        flush=True,
    )
