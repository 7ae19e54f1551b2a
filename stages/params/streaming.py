"""Values of params.yaml that need all rows at once, and so exclude `load.streaming`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.params.schema import Params

OF_ALL_ROWS = ("near_duplicate", "near_eval", "length_outlier", "rare_language")
"""Checks that compare a row with all others."""


def against_streaming(params: Params) -> list[str]:
    """Return what excludes a stream, one problem per value with its key and a way out; empty if nothing does."""
    load, train = params.load, params.train
    found = [
        f"load.checks.{name}: {getattr(load.checks, name)} compares all rows with one another; state off"
        for name in OF_ALL_ROWS
        if getattr(load.checks, name) != "off"
    ]
    if load.eval.count is not None:
        found.append("load.eval.count chooses among all rows; state load.eval.path or load.eval.fraction")
    if load.interleave.strategy != "concat":
        found.append("load.interleave.strategy chooses among all rows; state concat, which reads the sources in turn")
    if load.rehearsal is not None:
        found.append("load.rehearsal gets its share of all trained tokens; state null")
    for number, source in enumerate(load.sources):
        key = f"load.sources[{number}]"
        if source.max_rows is not None and not source.hub:
            found.append(f"{key}.max_rows chooses among all rows; remove it, since train.max_steps ends the stream")
        if not source.hub and "://" in source.path:
            found.append(f"{key}.path: a URL is copied to the disk; link the file into data/, or use the hub")
    if train.max_steps < 1:
        found.append(f"train.max_steps: {train.max_steps}, but a stream has no length; state the number of steps")
    if train.launch.processes > 1:
        found.append(f"train.launch.processes: {train.launch.processes}, but one process reads a stream; state 1")
    if train.order not in ("shuffled", "sequential"):
        found.append(f"train.order: {train.order} sorts all rows; state shuffled or sequential")
    if train.init_lora_weights == "eva":
        found.append("train.init_lora_weights: eva needs rows before the stream begins; state pissa or olora")
    if train.arguments.get("dataloader_num_workers"):
        found.append("train.arguments.dataloader_num_workers: each worker would read the whole stream; remove it")
    for name, section in (("format", params.format), ("pack", params.pack)):
        if section.workers == "ray":
            found.append(f"{name}.workers: ray, but `train` prepares the rows itself; state processes")
    return found
