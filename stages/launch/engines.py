"""Engines of distributed training (DDP, FSDP2, DeepSpeed), by name or from a configuration file of accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.params.schema import Engine, LaunchSection
from stages.preflight.engines import check_engine

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
    values = check_engine(section, root)
    if values is None:
        common = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "debug": False}
        named: Engine = next(name for name in SETTINGS if name == section.engine)
        return _write_config(folder / "accelerate.yaml", {**common, **SETTINGS[named]})
    if values["distributed_type"] == "MULTI_CPU":  # accelerate would look for MPI; MULTI_GPU uses gloo on CPUs
        return _write_config(folder / "accelerate.yaml", {**values, "distributed_type": "MULTI_GPU"})
    return root / section.engine


def _write_config(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return file
