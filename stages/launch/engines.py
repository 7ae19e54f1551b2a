"""What shares a model among processes: engines by name, and accelerate's own configuration files."""

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
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part; any number reads them
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
    """The accelerate configuration of the section's engine: the user's own file, or one written to `folder`.

    Args:
        section: Names an engine, or a file relative to the root.
        root: The checkout.
        folder: For a file that is written here.

    Raises:
        ValueError: There is no such file, it can't be used, or the engine's package is not installed.
    """
    if section.engine in ENGINES:
        file, values = folder / "accelerate.yaml", SETTINGS[section.engine]
        _check_package(f"train.launch.engine {section.engine}", values["distributed_type"])
        common = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "debug": False}
        return _written(file, {**common, **values})
    file = root / section.engine
    if not file.is_file():
        known = ", ".join(ENGINES)
        raise ValueError(f"train.launch.engine: {section.engine}: no such file, and none of the engines {known}")
    values = read_engine_file(file)
    check_engine_file(section, values)
    if values["distributed_type"] == "MULTI_CPU":  # accelerate would look for MPI; over gloo it is the same as this
        return _written(folder / "accelerate.yaml", {**values, "distributed_type": "MULTI_GPU"})
    return file


def _written(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return file


def read_engine_file(file: Path) -> dict[str, Any]:
    """What a configuration file of accelerate, YAML or JSON, states."""
    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())
        raise ValueError(f"train.launch.engine: {file.name} can't be read as YAML: {place}") from None
    if not isinstance(values, dict):
        raise ValueError(f"train.launch.engine: {file.name} holds no settings; `accelerate config` writes such a file")
    return values


def check_engine_file(section: LaunchSection, values: dict[str, Any]) -> None:
    """Refuse a configuration that would not start several processes, or whose settings would be ignored.

    Args:
        section: What params.yaml states.
        values: What the file states.

    Raises:
        ValueError: Names the file, its key, and what decides it.
    """
    name, kind = section.engine, str(values.get("distributed_type"))
    if kind not in ("FSDP", "DEEPSPEED") and not kind.startswith("MULTI_"):
        raise ValueError(
            f"{name}: distributed_type is {kind}, which shares no training among processes; it must be MULTI_GPU, "
            "MULTI_CPU, FSDP or DEEPSPEED"
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
        "dynamo_config": ("the trainer, which compiles nothing,", (None, {}, {"dynamo_backend": "NO"})),
    }
    for key, (what, allowed) in decided.items():
        if values.get(key) not in allowed:
            raise ValueError(
                f"{name}: {key} is {values[key]!r}, but {what} decides it and this would be ignored; leave it out"
            )


def _check_package(what: str, kind: str) -> None:
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"{what} needs the package deepspeed, which is not installed; `pip install deepspeed`, or use fsdp2, which "
            "shares the model out likewise and comes with torch"
        )
