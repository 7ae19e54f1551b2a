"""Figures of all parts, in `results.json`, and the page docs/reliability.md that is made from them."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "reliability.md"

PARTS = {
    "fuzz": ("Damaged and hostile input", "fuzz"),
    "kills": ("Kills of stages", "kills"),
    "servers": ("Kills of `make ui`", "servers"),
    "resumes": ("Resumed trainings", "resumes"),
    "memory": ("Memory", "memory"),
    "full_disk": ("Full disk", "full_disk"),
    "users": ("Two users", "users"),
}
"""Part -> its heading on the page, and the module that measures it."""

INTRODUCTION = """# Measured reliability

<!-- Written by `python -m benchmarks.reliability.PART`; edit benchmarks/reliability/ instead. -->

What was done to the pipeline, and what came of it. Every part can be run again, with other numbers and seeds:
`python -m benchmarks.reliability.PART --help`. Its figures then replace those of the same row here.
"""


def add(part: str, name: str, figures: dict[str, Any], *, more: bool = False) -> None:
    """Store the figures of a measurement, in place of those of the same name, and write the page.

    Args:
        part: One of `PARTS`.
        name: What was measured; the row of the table.
        figures: Column -> value. The same columns for all names of a part.
        more: Whether they count in addition to the stored ones, which other seeds made: numbers are summed.
    """
    (ROOT / ".state").mkdir(exist_ok=True)
    with FileLock(f"{ROOT}/.state/reliability.lock"):
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        before = results.get(part, {}).get(name)
        if more and before is not None:
            figures = _sum(before["figures"], figures)
        entry = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "figures": figures}
        results.setdefault(part, {})[name] = entry
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


def _sum(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Add numbers of two measurements, and list their seeds."""
    joined = {**before, **{name: before.get(name, 0) + value for name, value in after.items() if name != "seed"}}
    if "seed" in after:
        seeds = [*str(before.get("seed", "")).split(", "), str(after["seed"])]
        if seeds[-1] in seeds[:-1]:
            raise ValueError(f"seed {seeds[-1]} is counted already; use another")
        joined["seed"] = ", ".join(each for each in seeds if each)
    return joined


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    for part, (heading, module) in PARTS.items():
        if part not in results:
            continue
        entries = results[part]
        lines += [f"## {heading}\n", f"{_explained(module)}\n"]
        columns = list(dict.fromkeys(column for entry in entries.values() for column in entry["figures"]))
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, entry in entries.items():
            lines.append(f"| {name} | " + " | ".join(_cell(entry["figures"].get(column)) for column in columns) + " |")
        machines = sorted({f"{entry['machine']}, {entry['date']}" for entry in entries.values()})
        lines += ["", f"Measured on: {'; '.join(machines)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _explained(module: str) -> str:
    """Return the second paragraph of a module's docstring, which says what is measured."""
    source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    return source.split('"""')[1].split("\n\n")[1].strip()


def _cell(figure: Any) -> str:
    if figure is None:
        return ""
    return f"{figure:,}" if isinstance(figure, int) else str(figure)


def machine() -> str:
    """Describe this machine."""
    memory = round(psutil.virtual_memory().total / 2**30)
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name += " with AVX-512" if "avx512f" in flags else " with AVX2" if "avx2" in flags else ""
    return f"{len(os.sched_getaffinity(0))} cores ({name}), {memory} GiB, {platform.system()}"
