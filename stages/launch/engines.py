"""Engines of distributed training (DDP, FSDP2, DeepSpeed), by name or from a configuration file of accelerate."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.params.schema import ENGINES, Engine, LaunchSection

SETTINGS: dict[Engine, dict[str, Any]] = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # one file per process, read by any number of processes
        },
    },
    "deepspeed_zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "deepspeed_zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    },
}
"""Accelerate's settings of each engine."""


def engine_file(section: LaunchSection, root: Path, folder: Path) -> Path:
    """Return the accelerate configuration file of the section's engine, and write it if the engine is given by name.

    Args:
        section: Its `engine` is a name, or the path of a file relative to the root.
        root: The checkout.
        folder: Where a new file is written.

    Raises:
        ValueError: The file does not exist or can't be used, or the engine's package is not installed.
    """
    if section.engine in ENGINES:
        file, values = folder / "accelerate.yaml", SETTINGS[section.engine]
        _check_package(f"train.launch.engine {section.engine}", values["distributed_type"])
        common = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "debug": False}
        return _write_config(file, {**common, **values})
    file = root / section.engine
    if not file.is_file():
        known = ", ".join(ENGINES)
        raise ValueError(f"train.launch.engine: {section.engine}: no such file, and not one of the engines {known}")
    values = read_engine_file(file)
    check_engine_file(section, values)
    if values["distributed_type"] == "MULTI_CPU":  # accelerate would look for MPI; MULTI_GPU uses gloo on CPUs
        return _write_config(folder / "accelerate.yaml", {**values, "distributed_type": "MULTI_GPU"})
    return file


def _write_config(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return file


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
