"""Wheels that a bare GPU machine lacks, in folders below a size: `python -m benchmarks.gpu wheels --out FOLDER`.

Run it on a machine with a package index, then carry one folder after the other. The GPU machine is expected to have
torch, triton, transformers, accelerate and peft with what they depend on; `--needed` names what else to carry.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

LIMIT_MB = 60
NEEDED = ["datasets", "dill", "multiprocess", "xxhash", "liger-kernel", "trl", "pydantic", "typing-inspection", "click"]
"""Without their dependencies: what the machine has is not carried again."""
LARGE = ["bitsandbytes"]
"""Packages that fill a folder of their own."""


def download(folder: Path, needed: list[str], python_version: str, platform: str) -> list[Path]:
    """Download wheels by pip, without dependencies, and return the folders that hold them, each below `LIMIT_MB`.

    Raises:
        SystemExit: pip found no wheel of a package; its message is passed on.
    """
    everything = folder / "all"
    everything.mkdir(parents=True, exist_ok=True)
    for name in needed:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(everything),
        ]
        command += ["--python-version", python_version, "--platform", platform, "--platform", "any", "--quiet", name]
        if subprocess.run(command).returncode:
            raise SystemExit(f"no wheel of {name} for Python {python_version} on {platform} was found")
    return split(everything, folder)


def split(everything: Path, folder: Path) -> list[Path]:
    """Distribute the wheels of a folder over folders below `LIMIT_MB`, the largest first (first-fit decreasing)."""
    parts: list[tuple[Path, int]] = []
    for wheel in sorted(everything.glob("*.whl"), key=lambda path: -path.stat().st_size):
        size = wheel.stat().st_size
        fitting = next((number for number, (_, used) in enumerate(parts) if used + size <= LIMIT_MB * 1_000_000), None)
        if fitting is None:
            parts.append((folder / f"part{len(parts) + 1}", 0))
            parts[-1][0].mkdir(exist_ok=True)
            fitting = len(parts) - 1
        place, used = parts[fitting]
        shutil.move(str(wheel), place / wheel.name)
        parts[fitting] = (place, used + size)
    everything.rmdir()
    return [place for place, _ in parts]
