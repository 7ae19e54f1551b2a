"""Ratios of benchmark runs over time: `python benchmarks/compare.py [FILE]`.

`benchmarks/record.jsonl` has one line per recorded run (`train_speed.py --record`): date, commit, kind of machine,
and figures that are ratios within that run, such as sft's speed over trl's. Absolute speeds of shared machines say
little, so only ratios are compared, and only between runs on the same kind of machine (`machine_kind`).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent / "record.jsonl"
MOVED = 0.1
"""A ratio that changed by more than this share is reported: runs of the same code differ by about 5 %."""


def machine_kind() -> str:
    """Return what decides the speed here, e.g. `x86_64 AVX512 2 cores` or the name of the GPU."""
    import os

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()} cores"


def record(benchmark: str, ratios: dict[str, float], file: Path = RECORD) -> dict[str, Any]:
    """Append a run to the record, and return its line.

    Args:
        benchmark: Name and settings of the run; only runs of the same name are compared.
        ratios: Figures by name, where more is better.
        file: The record.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=file.parent, capture_output=True, text=True)
    line = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "machine": machine_kind(),
        "benchmark": benchmark,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
    }
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    return line


def moved(lines: list[dict[str, Any]]) -> list[str]:
    """Return a sentence per ratio of the newest runs that differs from the run before on the same kind of machine."""
    found = []
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    before: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        key = (line["machine"], line["benchmark"])
        if key in newest:
            before[key] = newest[key]
        newest[key] = line
    for key, line in newest.items():
        if key not in before:
            found.append(f"{key[1]} on {key[0]}: one run ({line['commit']}), nothing to compare with")
            continue
        old = before[key]
        for name, value in line["ratios"].items():
            if name not in old["ratios"]:
                continue
            change = value / old["ratios"][name] - 1
            if abs(change) > MOVED:
                word = "better" if change > 0 else "WORSE"
                found.append(
                    f"{key[1]} on {key[0]}: {name} {old['ratios'][name]} ({old['commit']}) -> "
                    f"{value} ({line['commit']}), {change:+.0%}, {word}"
                )
    return found


def main() -> int:
    """Print what moved; 1 if a ratio became worse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=RECORD)
    file = parser.parse_args().file
    if not file.exists():
        print(
            f"{file} does not exist: `python benchmarks/train_speed.py --record` writes the first line", file=sys.stderr
        )
        return 2
    sentences = moved([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()])
    print("\n".join(sentences) or "nothing moved by more than 10 %")
    return any(sentence.endswith("WORSE") for sentence in sentences)


if __name__ == "__main__":
    sys.exit(main())
