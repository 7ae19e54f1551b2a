"""Run the cases on a library and write the table: `python -m benchmarks.silent_failures --help`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.table import PAGE, ROOT, read_results, results_path, write_page

PYTHONS = {
    "sft": Path(sys.executable),
    "trl": ROOT / "benchmarks" / ".venv-trl" / "bin" / "python",
    "unsloth": ROOT / "benchmarks" / ".venv-unsloth" / "bin" / "python",
}
"""Interpreter of each library; benchmarks/README.md says how to make them."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.silent_failures", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the cases on one library, in its own environment, and store the results")
    run.add_argument("library", choices=sorted(PYTHONS))
    run.add_argument("--python", type=Path, help="interpreter that has the library")
    run.add_argument("--only", nargs="+", metavar="CASE", default=[], help="run these; other results are kept")
    run.add_argument("--show", action="store_true", help="print tracebacks and values, and store nothing")
    verbs.add_parser("table", help=f"write {PAGE.relative_to(ROOT)} from the results")
    args = parser.parse_args()
    if args.verb == "table":
        write_page()
        return
    python = args.python or PYTHONS[args.library]
    if not python.exists():
        raise SystemExit(f"{python} does not exist: make it as benchmarks/README.md says, or name another by --python")
    about, found = run_library(args.library, python, args.only, show=args.show)
    if not args.show:
        store(args.library, about, found, keep=bool(args.only))


def run_library(name: str, python: Path, only: list[str], *, show: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run cases in the library's interpreter.

    A process that ends without a result (a segmentation fault) costs one case; another runs those after it.

    Returns:
        The library's name and versions, and the result of each case.
    """
    about: dict[str, Any] = {}
    found: dict[str, Any] = {}
    while True:
        begun = None
        for kind, content in worker_lines(name, python, only, skip=list(found), show=show):
            if kind == "ABOUT":
                about = json.loads(content)
            elif kind == "BEGIN":
                begun = content
            elif kind == "RESULT" and begun is not None:
                found[begun] = json.loads(content)
                print(f"{name}: {begun}: {found[begun]['verdict']}", flush=True)
                begun = None
        if begun is None:
            break
        found[begun] = {"verdict": "crash", "value": "", "right": "", "message": "the process ended"}
    if not found:
        raise SystemExit(f"no case was run on {name}: {' '.join(only) or 'run it with --show to see why'}")
    return about, found


def worker_lines(name: str, python: Path, only: list[str], *, skip: list[str], show: bool) -> Iterator[tuple[str, str]]:
    """Start a worker and yield its lines as (kind, content)."""
    options = [
        *(["--only", *only] if only else []),
        *(["--skip", *skip] if skip else []),
        *(["--show"] if show else []),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [str(python), "-m", "benchmarks.silent_failures.worker", name, *options],
        stdout=subprocess.PIPE,
        stderr=None if show else subprocess.DEVNULL,  # progress bars of three libraries
        text=True,
        env=environment,
    )
    for line in process.stdout or ():
        kind, _, content = line.rstrip("\n").partition(" ")
        yield kind, content
    process.wait()


def store(name: str, about: dict[str, Any], found: dict[str, Any], *, keep: bool) -> None:
    """Write the results of a library, with those of other cases if `keep`."""
    before = read_results(name)["cases"] if keep and results_path(name).exists() else {}
    content = {**about, "cases": dict(sorted({**before, **found}.items()))}
    results_path(name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
