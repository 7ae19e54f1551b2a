"""Which families of transformers this library trains: `python benchmarks/families.py --help`.

Every type of transformers' causal language models, and of vision-language models with rows of text, is built as a tiny
model and trained packed, joined and padded, by LoRA and in full, beside a plain loop over single documents
(`family_checks.py`). `--write docs/models.md` writes the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers

from benchmarks.family_checks import Failure, FamilyChecks, FamilyResult
from benchmarks.family_page import page, verdict
from benchmarks.tiny_families import Sizes, families

SECONDS_PER_FAMILY = 600

Depth = Literal["all", "quick", "plain"]


def check_in_child(family: str, sizes: Sizes, seed: int, depth: Depth, pipe: Connection) -> None:
    """Check a family and send the result; runs in a process of its own, since code of a family may crash it."""
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        checks = FamilyChecks(family, sizes, seed, quick=depth == "quick")
        pipe.send(checks.run_plain() if depth == "plain" else checks.run())
    pipe.close()


def check_all(
    names: list[str],
    sizes: Sizes,
    seed: int,
    num_processes: int,
    timeout: float = SECONDS_PER_FAMILY,
    *,
    depth: Depth = "all",
) -> Iterator[FamilyResult]:
    """Check families, each in a process of its own.

    Args:
        names: Families.
        sizes: Of the models.
        seed: Of weights and documents.
        num_processes: Number of families to check at the same time.
        timeout: Seconds after which a family counts as failed.
        depth: `all`, `quick` (see `FamilyChecks`), or `plain`: only the plain loop, which says what is buildable.

    Yields:
        The result of each family, as they are ready.
    """
    quiet()
    context = multiprocessing.get_context("fork")  # what is imported here is not imported again for each family
    gc.collect()
    gc.freeze()
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < num_processes:
            family = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=check_in_child, args=(family, sizes, seed, depth, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (family, process, time.monotonic())
        ready = wait(list(running), timeout=1)
        for pipe, (family, process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if pipe in ready:
                try:
                    result = pipe.recv()
                except EOFError:
                    process.join()
                    result = _failed(family, f"its process ended with exit code {process.exitcode}")
            elif seconds > timeout:
                process.kill()
                result = _failed(family, f"it took more than {timeout:.0f} seconds")
            else:
                continue
            process.join()
            del running[pipe]
            result.seconds = seconds
            yield result


def _failed(family: str, reason: str) -> FamilyResult:
    return FamilyResult(family, failures={"all runs": Failure("crash", reason)})


def quiet() -> None:
    """Silence what libraries print about each model."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main() -> None:
    """Check families and print a line about each; write the table if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="families to check; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of weights and documents")
    parser.add_argument("--processes", type=int, default=2, help="families to check at the same time")
    parser.add_argument("--depth", choices=get_args(Depth), default="all", help="what to run")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="file for the table, such as docs/models.md")
    parser.add_argument("--json", type=Path, help="file for all results")
    for each in fields(Sizes):
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", type=int, default=each.default, help="size of the models"
        )
    args = parser.parse_args()
    sizes = Sizes(**{each.name: getattr(args, each.name) for each in fields(Sizes)})
    results = []
    for result in check_all(args.only or list(families()), sizes, args.seed, args.processes, depth=args.depth):
        results.append(result)
        print(f"{result.family}: {verdict(result)} ({result.seconds:.1f} s) {result.unbuildable or ''}", flush=True)
        for name, failure in result.failures.items():
            print(f"    {name}: {failure.kind}: {failure.reason} ({failure.place})", flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(each) for each in results], indent=1))
    if args.write:
        args.write.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
