"""The machine that computes: what decides, besides params, data, code and versions, on a result's last digits."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MACHINE = "machine."


def machine_facts() -> dict[str, str]:
    """Processor, its cores that this process may use, and how many threads it was told to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""),
        "cores": str(cores),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def machine_tags() -> dict[str, str]:
    """This machine, as a run's tags name it."""
    return {f"{MACHINE}{name}": value for name, value in machine_facts().items()}


def processor_name(cpuinfo: str) -> str:
    """The processor's name out of Linux's /proc/cpuinfo, or what Python knows elsewhere."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"
