"""Measurements on one GPU: `python -m benchmarks.gpu PART`; see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for results as JSON (wheels: for wheels)")
    parts = parser.add_subparsers(dest="part", required=True)
    numerics = parts.add_parser("numerics", help="each way to compute against the CPU's float32")
    speed = parts.add_parser("speed", help="tokens per second and memory at the shapes of real models")
    repro = parts.add_parser("repro", help="the stages of the pipeline, one after the other, with their times")
    roofline = parts.add_parser("roofline", help="FLOP and bytes of a step on paper")
    wheels = parts.add_parser("wheels", help="download what a bare machine lacks")
    contend = parts.add_parser("contend", help=argparse.SUPPRESS)
    child = parts.add_parser("fsdp2-child", help=argparse.SUPPRESS)
    for each in (numerics, speed, contend, child):
        each.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
    for each in (numerics, speed):
        each.add_argument("--only", nargs="*", help="parts of names")
    for each in (speed, contend):
        each.add_argument("--steps", type=int, default=6, help="timed steps of each contender")
        each.add_argument("--tiny", action="store_true", help="the same kinds of models and rows at the size of a test")
    speed.add_argument("--limit", type=float, default=240, help="seconds per contender")
    speed.add_argument("--budget", type=float, default=560, help="seconds for all")
    speed.add_argument("--trl-python", type=Path, help="interpreter with trl; this one if it has trl")
    speed.add_argument("--unsloth-python", type=Path, help="interpreter with unsloth; this one if it has unsloth")
    contend.add_argument("--name", required=True)
    contend.add_argument("--job", required=True)
    roofline.add_argument("--shape", default="llama-3-8b")
    roofline.add_argument("--card", default="h100")
    roofline.add_argument("--tokens", type=int, default=4096)
    roofline.add_argument("--document", type=int, default=4096, help="tokens per document")
    roofline.add_argument("--method", choices=["lora", "qlora", "full"], default="lora")
    roofline.add_argument("--rank", type=int, default=16)
    roofline.add_argument("--checkpointing", action="store_true")
    wheels.add_argument(
        "--needed", nargs="*", help="packages; default: those that this library needs beside torch and transformers"
    )
    wheels.add_argument("--python-version", default="3.12")
    wheels.add_argument("--platform", default="manylinux_2_28_x86_64")
    repro.add_argument(
        "--stages", nargs="*", default=["load", "format", "pack", "train", "merge", "quantize", "evaluate"]
    )
    return globals()[f"run_{parser.parse_args().part.replace('-', '_')}"](parser.parse_args())


def run_numerics(args: argparse.Namespace) -> int:
    """Run `numerics`; 1 if a case differs or fails."""
    from benchmarks.gpu import numerics

    print(f"| case, on {device_name(args)} | verdict | loss | change | |\n|---|---|---|---|---|", flush=True)
    rows = numerics.run(args.device, args.only)
    write(args.out, "numerics", rows, args)
    return any(row["verdict"] in ("differs", "failed") for row in rows)


def run_fsdp2_child(args: argparse.Namespace) -> int:
    """Train as the child of a case of `numerics`."""
    from benchmarks.gpu import numerics

    device_name(args)
    numerics.fsdp2_child(args.device)
    return 0


def run_speed(args: argparse.Namespace) -> int:
    """Run `speed`; 1 if sft fails in a row."""
    from benchmarks.gpu import speed

    print(f"{device_name(args)}:\n", flush=True)
    pythons = {"sft": sys.executable}
    for library, given in (("trl", args.trl_python), ("unsloth", args.unsloth_python)):
        python = str(given or sys.executable)
        if subprocess.run([python, "-c", f"import {library}"], capture_output=True).returncode == 0:
            pythons[library] = python
    rows = speed.run(args, pythons)
    write(args.out, "speed", rows, args)
    return any("tokens_per_second" not in row for row in rows if row["contender"] == "sft")


def run_contend(args: argparse.Namespace) -> int:
    """Train as one contender of `speed`."""
    from benchmarks.gpu import speed

    device_name(args)
    job = speed.Job(**json.loads(args.job))
    print("RESULT " + json.dumps(speed.contend(args.name, job, args.tiny, args.steps, args.device)), flush=True)
    return 0


def run_repro(args: argparse.Namespace) -> int:
    """Run the stages of params.yaml without DVC, and print the seconds of each; stop at the first that fails."""
    times = {}
    for stage in args.stages:
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "stages", stage])
        times[stage] = time.monotonic() - started
        print(f"{stage}: {times[stage]:.1f} s", flush=True)
        if done.returncode:
            return done.returncode
    write(args.out, "repro", [times], args)
    return 0


def run_roofline(args: argparse.Namespace) -> int:
    """Print the table of a step on paper."""
    from benchmarks.gpu.roofline import CARDS, table
    from benchmarks.gpu.shapes import SHAPES

    shape, card = SHAPES[args.shape], CARDS[args.card]
    print(table(shape, card, args.tokens, args.document, args.method, args.rank, args.checkpointing))
    return 0


def run_wheels(args: argparse.Namespace) -> int:
    """Download wheels and print their folders."""
    from benchmarks.gpu import wheels

    if not args.out:
        raise SystemExit("wheels: name a folder for them: python -m benchmarks.gpu --out FOLDER wheels")
    needed = args.needed or [*wheels.NEEDED, *wheels.LARGE]
    for folder in wheels.download(args.out, needed, args.python_version, args.platform):
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        print(f"{folder}: {size:.0f} MB, {', '.join(sorted(path.name.split('-')[0] for path in folder.iterdir()))}")
    return 0


def device_name(args: argparse.Namespace) -> str:
    """Choose the device if none is named, and return the name of the card or processor."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})"


def write(folder: Path | None, part: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write rows with the versions and the device that they were measured with, if a folder is named."""
    if not folder:
        return
    import accelerate
    import peft
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, peft)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    record = {"part": part, "device": device, "versions": versions, "cores": os.cpu_count(), "rows": rows}
    (folder / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
