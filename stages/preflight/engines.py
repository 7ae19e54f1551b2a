"""Checks of the engine of a distributed training: the package that it needs, and a configuration file of accelerate."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.params.schema import ENGINES, LaunchSection


def check_engine(section: LaunchSection, root: Path) -> dict[str, Any] | None:
    """Check that an engine can be used, as far as its package and its file tell.

    Args:
        section: Its `engine` is a name, or the path of a file relative to the root.
        root: The checkout.

    Returns:
        Content of the file; None if the engine is given by name.

    Raises:
        ValueError: The file does not exist or can't be used, or the engine's package is not installed.
    """
    if section.engine in ENGINES:
        kind = "DEEPSPEED" if section.engine.startswith("deepspeed") else ""
        _check_package(f"train.launch.engine {section.engine}", kind)
        return None
    file = root / section.engine
    if not file.is_file():
        known = ", ".join(ENGINES)
        raise ValueError(f"train.launch.engine: {section.engine}: no such file, and not one of the engines {known}")
    values = read_engine_file(file)
    check_engine_file(section, values)
    return values


def read_engine_file(file: Path) -> dict[str, Any]:
    """Read a configuration file of accelerate, YAML or JSON.

    Raises:
        ValueError: The file is not valid YAML, or not a mapping.
    """
    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())
        raise ValueError(f"train.launch.engine: {file.name} can't be read as YAML: {place}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"train.launch.engine: {file.name} contains no settings; `accelerate config` writes such a file"
        )
    return values


def check_engine_file(section: LaunchSection, values: dict[str, Any]) -> None:
    """Check that a configuration starts several processes, and that none of its settings would be ignored.

    Args:
        section: Section `train.launch` of params.yaml.
        values: Content of the file.

    Raises:
        ValueError: Names the file, the key, and the param that decides instead.
    """
    name, kind = section.engine, str(values.get("distributed_type"))
    if kind not in ("FSDP", "DEEPSPEED") and not kind.startswith("MULTI_"):
        raise ValueError(
            f"{name}: distributed_type is {kind}, which does not start several processes; it must be "
            "MULTI_GPU, MULTI_CPU, FSDP or DEEPSPEED"
        )
    _check_package(f"{name}: distributed_type DEEPSPEED", kind)
    decided = {
        "compute_environment": ("the launcher", (None, "LOCAL_MACHINE")),
        "num_processes": (f"train.launch.processes {section.processes}", (None, section.processes)),
        "num_machines": (f"train.launch.machines {section.machines}", (None, section.machines)),
        "machine_rank": ("train.launch.machine_rank or the environment", (None, 0)),
        "main_process_ip": ("train.launch.address or MASTER_ADDR", (None, section.address)),
        "main_process_port": ("train.launch.port", (None, section.port)),
        "mixed_precision": ("model.dtype", (None, "no", False)),  # YAML 1.1 reads `no` as False
        "dynamo_config": ("the trainer, which does not compile,", (None, {}, {"dynamo_backend": "NO"})),
    }
    for key, (what, allowed) in decided.items():
        if values.get(key) not in allowed:
            raise ValueError(
                f"{name}: {key} is {values[key]!r}, but {what} decides it and this would be ignored; remove the key"
            )


def _check_package(what: str, kind: str) -> None:
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"{what} needs the package deepspeed, which is not installed; `pip install deepspeed`, or use fsdp2, which "
            "shards the model, too, and is part of torch"
        )
