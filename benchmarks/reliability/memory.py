"""Memory: `python -m benchmarks.reliability.memory --only training`.

Training: a tiny model for 3,000 steps with logs, evaluations and checkpoints; memory that only this process uses (USS),
open files and threads after a third of the steps and at the end. Load: the stage on 300,000 rows, and on a tenth
of them. Evaluate: likelihood and answers of 5,000 rows, and of a tenth. Peaks are the largest memory of the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability import record
from tests.stages.training_root import environment
from tests.test_pipeline import call, change_params, make_project, order


def peak_of(command: list[str], folder: Path) -> tuple[int, float]:
    """Run a command; return the peak memory of its largest process in bytes, and its seconds."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak, started, ended = 0, time.monotonic(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            with suppress(psutil.Error):
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for member in family:
                    with suppress(psutil.Error):
                        peak = max(peak, member.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, said = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{command} failed: {said[-2000:]}")
    return peak, time.monotonic() - started


def training(count: int) -> None:
    """Measure a long training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.sft.long_training", folder, str(count)]
        done = subprocess.run(
            command, cwd=record.ROOT, env=environment(), capture_output=True, text=True, check=True
        ).stdout
    points = [json.loads(line.partition(" ")[2]) for line in done.splitlines() if line.startswith("FIGURES")]
    early, last = points[len(points) // 3], points[-1]
    record.add("memory", f"training, {count:,} steps", _figures(early["step"], early, last["step"], last))


def _figures(early: int, before: dict[str, Any], late: int, after: dict[str, Any]) -> dict[str, Any]:
    return {
        "first": f"{before['bytes'] / 1e6:.0f} MB at {early:,}",
        "last": f"{after['bytes'] / 1e6:.0f} MB at {late:,}",
        "growth": f"{(after['bytes'] - before['bytes']) / 1e6:+.1f} MB",
        "open files": f"{before['files']}, {after['files']}",
        "threads": f"{before['threads']}, {after['threads']}",
    }


def rows(stage: str, count: int) -> None:
    """Measure a stage on many rows and on a tenth of them."""
    peaks = {}
    for number in (count // 10, count):
        with tempfile.TemporaryDirectory(prefix="sft-memory-") as name:
            project = make_project(Path(name) / "project")
            if stage == "load":
                _write_rows(project / "data" / "shop_train.jsonl", number)
                change_params(project, {"load": {"checks": _without_sets(project)}})
            else:
                _write_rows(project / "data" / "shop_eval.jsonl", number)
                change_params(
                    project,
                    {"evaluate": {"num_rows": number, "batch_size": 16}, "load": {"checks": _without_sets(project)}},
                )
                call(project, "dvc", "repro", "merge")
                call(project, "dvc", "repro", "quantize")
            peaks[number] = peak_of([sys.executable, "-m", "stages", stage], project)
    (few, (small, _)), (many, (large, seconds)) = peaks.items()
    figures = {
        "first": f"{small / 1e6:.0f} MB at {few:,}",
        "last": f"{large / 1e6:.0f} MB at {many:,}",
        "growth": f"{(large - small) / 1e6:+.1f} MB",
        "seconds": round(seconds),
    }
    record.add("memory", f"{stage}, {count:,} rows", figures)
    print(stage, figures, flush=True)


def _without_sets(project: Path) -> dict[str, Any]:
    from stages.params.schema import load_params

    return {**load_params(project / "params.yaml").load.checks.model_dump(), "in_eval": "off"}


def _write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = order(number)
            row["messages"][0]["content"] += f" (order {number} of {path.stem})"
            file.write(json.dumps(row) + "\n")


MEASURED = {"training": (training, 3000), "load": (rows, 300_000), "evaluate": (rows, 5000)}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*MEASURED], default=[*MEASURED])
    parser.add_argument("--count", type=int, help="steps or rows")
    args = parser.parse_args()
    for name in args.only:
        function, count = MEASURED[name]
        if function is training:
            training(args.count or count)
        else:
            rows(name, args.count or count)


if __name__ == "__main__":
    main()
