"""Time and memory of load, format and pack against the number of rows: `python benchmarks/prepare_scale.py --rows N`.

The rows are conversations of about 300 tokens, made of words of Python's manual in random order. Every stage runs in a
separate process, as in the pipeline. Memory is the sum over the process and its children, sampled ten times per second.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from stages.params.schema import load_params  # noqa: E402

STAGES = ("load", "format", "pack")
WORDS_A_ROW, SPREAD = 165, 0.6
ROWS_AT_ONCE = 1000


class Usage(NamedTuple):
    """Cost of a stage: wall-clock seconds, CPU seconds, peak resident MB, and the part of it not backed by files."""

    seconds: float
    cpu_seconds: float
    resident_mb: float
    anonymous_mb: float


def conversations(num_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of one to three turns with log-normal lengths, as in real data."""
    source = np.random.default_rng(seed)
    words = np.array(" ".join(pydoc_data.topics.topics.values()).split())
    for start in range(0, num_rows, ROWS_AT_ONCE):
        for _ in range(min(ROWS_AT_ONCE, num_rows - start)):
            num_turns = int(source.choice((1, 1, 1, 2, 3)))
            num_words = source.lognormal(np.log(WORDS_A_ROW) - SPREAD**2 / 2, SPREAD) / num_turns
            messages = []
            for _ in range(num_turns):
                for role, share in (("user", 0.3), ("assistant", 0.7)):
                    picked = words[source.integers(len(words), size=max(3, int(num_words * share)))]
                    messages.append({"role": role, "content": f"{' '.join(picked)}."})
            yield {"messages": messages}


def write_root(root: Path, args: argparse.Namespace, num_rows: int) -> None:
    """Make a checkout that contains only data and parameters."""
    (root / "data").mkdir(parents=True)
    with (root / "data" / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(num_rows, seed=0))
    values = load_params(ROOT / "params.yaml").model_dump()
    values["model"]["name_or_path"] = str(args.model)
    values["load"] |= {"sources": [{"path": "data/rows.jsonl"}]}
    values["load"]["eval"] |= {"path": None, "fraction": 0.01, "count": None}
    values["format"]["num_proc"] = args.num_proc
    values["pack"] |= {"max_length": args.max_length, "num_proc": args.num_proc}
    # JSON is YAML
    (root / "params.yaml").write_text(json.dumps(values), encoding="utf-8")


def measure(stage: str, root: Path, threads: bool) -> Usage:
    """Run a stage and sample its memory."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if threads else "false", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    command = [sys.executable, "-m", "stages", stage, "--root", str(root)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    resident = anonymous = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        now = memory(process.pid)
        resident, anonymous = max(resident, now[0]), max(anonymous, now[1])
        time.sleep(0.1)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{stage} failed: {process.returncode}")
    seconds = time.perf_counter() - started
    return Usage(seconds, usage.ru_utime + usage.ru_stime, resident / 1e6, anonymous / 1e6)


def memory(pid: int) -> tuple[int, int]:
    """Return the resident bytes of a process and its children, and how many of them are not backed by files."""
    resident = anonymous = 0
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in processes:
        try:
            found = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        resident += found.rss
        anonymous += found.rss - found.shared
    return resident, anonymous


def main() -> None:
    """Measure every number of rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--model", type=Path, default=Path("~/.cache/sft/models/smollm2-135m-instruct").expanduser())
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--threads", action="store_true", help="let the tokenizer use threads")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--root", type=Path, help="folder for data and results, kept and used again")
    args = parser.parse_args()
    print("| rows | stage | seconds | CPU seconds | peak MB resident | of them anonymous |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for num_rows in args.rows:
            root = (args.root or Path(scratch)) / str(num_rows)
            if not root.exists():
                write_root(root, args, num_rows)
            for stage in args.stages:
                used = measure(stage, root, args.threads)
                figures = (
                    f"{used.seconds:.0f} | {used.cpu_seconds:.0f} | {used.resident_mb:.0f} | {used.anonymous_mb:.0f}"
                )
                print(f"| {num_rows:,} | {stage} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
