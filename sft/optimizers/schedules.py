"""Learning-rate schedules of transformers, and the arguments that they read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.suggest import did_you_mean

_COSINE_WITH_FLOOR = ("num_cycles", "min_lr", "min_lr_rate")
_PLATEAU = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")

SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": _PLATEAU,
    "cosine_with_min_lr": _COSINE_WITH_FLOOR,
    "cosine_warmup_with_min_lr": (*_COSINE_WITH_FLOOR, "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
    "greedy": (*_PLATEAU, "warmup", "max_lr", "smooth", "window_size", "reset_start"),
}
"""Schedule -> the arguments that it reads."""

NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Schedule -> arguments of which it needs exactly one."""

FOLLOWS_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that change the rate by the evaluation loss."""


def check_schedule(name: str, arguments: Mapping[str, Any] | None) -> None:
    """Check that a schedule reads all of its arguments, and has those that it needs.

    Raises:
        ValueError: An argument is unknown or missing.
    """
    given, known = arguments or {}, SCHEDULES[name]
    for argument in given:
        if argument not in known:
            there_are = f"it reads {', '.join(known)}" if known else "it reads none"
            hint = did_you_mean(argument, known, otherwise=there_are)
            raise ValueError(f"lr_scheduler_kwargs has {argument!r}, which {name} does not read: {hint}")
    needed = NEEDED.get(name, ())
    if needed and len(set(needed) & set(given)) != 1:
        raise ValueError(f"{name} needs {' or '.join(needed)} in lr_scheduler_kwargs, one of them")
