"""Resumed trainings: `python -m benchmarks.reliability.resumes --count 40 --seed 1`.

A tiny model is trained once without interruption, and once more with SIGKILL or SIGTERM at random moments, each time
started again. Weights, curve and figures must be those of the uninterrupted training, bit for bit. With another number
of processes at every start, sums are rounded in another order: there the largest difference of a weight is stated.
SIGTERM saves a checkpoint first.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from benchmarks.reliability import record
from stages.checkout.paths import Paths
from tests.stages.training_root import make_training_root, run_stage, set_params, start_stage

LENGTH = {"max_steps": 24, "logging_steps": 3, "save_steps": 2, "eval_steps": 8}
TWO = {"launch": {"processes": 2}, "per_device_train_batch_size": 2}

TRAININGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full fine-tuning": {"method": "full"},
    "gradient accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "dropout": {"lora_dropout": 0.1},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "all of these": {"lora_dropout": 0.1, "neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2},
    "2 processes (gloo)": TWO,
    "1, 2 or 4 processes by turns": {},
}
OTHER_NUMBER = "1, 2 or 4 processes by turns"
BATCH = 4
"""Rows of a step, whatever the number of processes."""


def prepare(root: Path, name: str) -> Paths:
    """Make a checkout for a training."""
    values = dict(TRAININGS[name])
    launch = values.pop("launch", None)
    paths = make_training_root(root, **LENGTH, **values)
    set_params(root, launch, **LENGTH, **values)
    return paths


def interrupt(paths: Paths, rng: random.Random) -> tuple[str, bool]:
    """Start a training, interrupt it at a random moment, and return what it printed, and whether it was interrupted."""
    process = start_stage(paths, SFT_PROGRESS="events")
    assert process.stdout is not None
    lines: list[str] = []
    wait_for, delay_s = rng.randint(1, 5), rng.uniform(0, 0.4)
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    begun = threading.Event()

    def read() -> None:
        nonlocal wait_for
        for line in process.stdout or ():
            lines.append(line)
            wait_for -= line.startswith("PROGRESS")
            if wait_for == 0:
                begun.set()
        begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    time.sleep(delay_s)
    process.send_signal(number)  # nothing happens if it has ended
    code = process.wait(timeout=300)
    reader.join()
    return "".join(lines), code != 0


def measure(name: str, count: int, seed: int) -> dict[str, Any]:
    """Interrupt a training so many times; return the figures."""
    rng = random.Random(f"{seed}:{name}")
    resumed = interrupted = rounds = 0
    faults: list[str] = []
    difference = 0.0
    with tempfile.TemporaryDirectory(prefix="sft-resumes-") as folder:
        whole = prepare(Path(folder) / "whole", name)
        run_stage(whole)
        while interrupted < count:
            rounds += 1
            paths = prepare(Path(folder) / f"killed{rounds}", name)
            for _ in range(4):
                if name == OTHER_NUMBER:
                    _other_number(paths, rng)
                output, was_interrupted = interrupt(paths, rng)
                interrupted += was_interrupted
                resumed += "resuming from" in output
                if not was_interrupted or interrupted >= count:
                    break
            try:
                resumed += "resuming from" in run_stage(paths)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                faults.append(f"the last run failed: {str(error)[-2000:]}")
                continue
            if name == OTHER_NUMBER:
                difference = max(difference, _largest_difference(paths, whole))
                faults += [f"weights differ by {difference}"] if difference > 1e-5 else []
            else:
                faults += _differing(paths, whole)
    for fault in faults:
        print(f"fault: {name}: {fault}", flush=True)
    equal = f"at most {difference:.1e}" if name == OTHER_NUMBER else "none" if not faults else "yes"
    return {
        "interruptions": interrupted,
        "starts from a checkpoint": resumed,
        "trainings": rounds,
        "difference": equal,
        "faults": len(faults),
        "seed": seed,
    }


def _other_number(paths: Paths, rng: random.Random) -> None:
    processes = rng.choice((1, 2, 4))
    values = {**LENGTH, "per_device_train_batch_size": BATCH // processes}
    set_params(paths.root, {"processes": processes}, **values)


def _differing(found: Paths, expected: Paths) -> list[str]:
    """Return what differs between the outputs of two trainings, bit for bit."""
    wanted = {file.relative_to(expected.root): file for file in expected.out("train").rglob("*") if file.is_file()}
    wanted[Path("reports/metrics/train.json")] = expected.metrics("train")
    # it names the base model, which each checkout has for itself
    names = [name for name in wanted if name.name not in ("adapter_config.json", "README.md")]
    return [
        f"{name} differs"
        for name in names
        if not (found.root / name).is_file() or (found.root / name).read_bytes() != wanted[name].read_bytes()
    ]


def _largest_difference(found: Paths, expected: Paths) -> float:
    name = ("train", "model", "adapter_model.safetensors")
    ours, theirs = load_file(found.out(*name)), load_file(expected.out(*name))
    return max(float(abs(ours[key] - theirs[key]).max()) for key in theirs)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*TRAININGS], default=[*TRAININGS], metavar="TRAINING")
    parser.add_argument("--count", type=int, default=40, help="interruptions of all trainings together")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name in args.only:
        figures = measure(name, -(-args.count // len(args.only)), args.seed)
        record.add("resumes", name, figures)
        print(name, figures, flush=True)


if __name__ == "__main__":
    main()
