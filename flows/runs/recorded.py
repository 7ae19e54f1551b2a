"""A stage's inputs: as they are now, as DVC recorded them, and the deletion of a wrong record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage
from ruamel.yaml import YAML

from sft.folders import partial_file

Inputs = dict[str, Any]


def present_inputs(root: Path, stage: str) -> Inputs:
    """Return the hashes of a stage's present inputs: code, data, params and command.

    A missing input has no entry; DVC itself reports it.
    """
    with Repo(str(root)) as repo:
        found = _stage(repo, root, stage)
        inputs: Inputs = {"cmd": found.cmd}
        for dependency in found.deps:
            try:
                value = dependency.get_hash().value
            except (FileNotFoundError, DvcException):
                continue
            inputs.update(_entries(root, dependency, value))
        return inputs


def recorded_inputs(root: Path, stage: str) -> Inputs:
    """Return the inputs in dvc.lock, from which the stage's present outs were computed according to DVC."""
    entry = _lock(root).get("stages", {}).get(stage, {})
    with Repo(str(root)) as repo:
        found = _stage(repo, root, stage)
        inputs: Inputs = {"cmd": entry.get("cmd")}
        for dependency in found.deps:
            if dependency.hash_info:
                inputs.update(_entries(root, dependency, dependency.hash_info.value))
        return inputs


def discard_record(root: Path, stage: str, since: float) -> None:
    """Delete DVC's record of a stage: its entry in dvc.lock and the one in the run cache.

    Args:
        root: The checkout.
        stage: The stage's name.
        since: When the stage started, in seconds since the epoch; older entries of the run cache are kept.
    """
    lock = _lock(root)
    entry = lock.get("stages", {}).pop(stage, None)
    with Repo(str(root)) as repo:
        run_cache = Path(repo.stage_cache.cache_dir)
    for path in run_cache.glob("*/*/*"):
        if path.stat().st_mtime >= since and YAML(typ="safe").load(path) == entry:
            path.unlink()
            # DVC fails on an empty folder here
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    with partial_file(root / "dvc.lock") as partial, partial.open("w", encoding="utf-8") as file:
        YAML().dump(lock, file)


def _stage(repo: Repo, root: Path, name: str) -> PipelineStage:
    return next(
        stage
        for stage in repo.index.stages
        if isinstance(stage, PipelineStage) and stage.name == name and Path(stage.path) == root / "dvc.yaml"
    )


def _entries(root: Path, dependency: Any, value: Any) -> Inputs:
    if isinstance(value, dict):
        return dict(value)
    return {os.path.relpath(dependency.fs_path, root): value}


def _lock(root: Path) -> Any:
    path = root / "dvc.lock"
    return YAML().load(path.read_text(encoding="utf-8")) if path.exists() else {}
