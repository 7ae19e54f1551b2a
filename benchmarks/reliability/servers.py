"""Kills of `make ui`: `python -m benchmarks.reliability.servers --count 20 --seed 1`.

`make ui` of a checkout with a tiny model, or one of its processes (Prefect's server, MLflow's server, the worker, the
supervisor of one of them) gets SIGKILL, SIGTERM or SIGINT at a random moment, half of the time while a run is at work.
All processes must end within 90 s, and `make ui` must start again with the same address. At the end a run must
complete, and no run may be left as running.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.reliability import record
from tests.flows.test_ui import free_port
from tests.test_kills import Operator, wait_until
from tests.test_operations import commit
from tests.test_pipeline import ROOT, change_params, make_project

ENDED = ("COMPLETED", "FAILED", "CRASHED")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PARTS = {
    "make ui": "flows.ui",
    "Prefect's server": "flows.processes.prefect_server",
    "MLflow's server": "flows.processes.mlflow_server",
    "worker": "flows.processes.worker",
}


def find(operator: Operator, part: str, *, guard: bool) -> psutil.Process | None:
    """Return a process of `make ui`, or the supervisor above it."""
    assert operator.ui is not None
    with suppress(psutil.Error):
        whole = psutil.Process(operator.ui.pid)
        if part == "make ui":
            return whole
        for process in whole.children(recursive=True):
            with suppress(psutil.Error):
                line = process.cmdline()
                if PARTS[part] in line and any("supervise.py" in word for word in line) == guard:
                    return process
    return None


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600, help="time after which no more is killed")
    parser.add_argument("--more", action="store_true", help="count in addition to what is recorded")
    # a shell starts commands in the background with SIGINT ignored, which what is started here would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = parser.parse_args()
    rng, ends = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="sft-servers-") as name:
        project = make_project(Path(name) / "project")
        change_params(project, {"train": {"max_steps": 60, "save_steps": 1, "eval_steps": 20}})
        shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "prefect.yaml", project / "prefect.yaml")
        commit(project)
        operator = Operator(project, free_port())
        killed, faults = Counter[str](), list[str]()
        while killed.total() < args.count and time.monotonic() < ends:
            operator.open_pages()
            assert operator.ui is not None
            if rng.random() < 0.5:
                operator.start(to_stage="train")
            time.sleep(rng.uniform(0, 12))
            part, number = rng.choice([*PARTS]), rng.choice(SIGNALS)
            victim = find(operator, part, guard=rng.random() < 0.3)
            if victim is None:
                continue
            family = [victim, *psutil.Process(operator.ui.pid).children(recursive=True)]
            guarded = "supervise.py" in " ".join(victim.cmdline()) and part != "make ui"
            victim.send_signal(number)
            what = f"{number.name} to {part}{' (supervisor)' if guarded else ''}"
            killed[part] += 1
            if number == signal.SIGINT and part != "make ui":
                # Ctrl-C in a terminal reaches `make ui` alone; to one of its processes it is no order to end
                time.sleep(1)
                operator.ui.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and any(map(_lives, family)):
                operator.ui.poll()
                time.sleep(0.1)
            left = [process for process in family if _lives(process)]
            faults += [f"{what}: still there after 90 s: {' '.join(process.cmdline())}" for process in left]
            print(time.strftime("%X"), what, "wrong:" if left else "", *left, flush=True)
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
        operator.open_pages()
        run = operator.start(to_stage="merge")
        wait_until(lambda: operator.state(run)["type"] in ENDED, 600)
        if operator.state(run)["type"] != "COMPLETED":
            faults.append(f"the last run ended as {operator.state(run)}")
        states = Counter(operator.state(one)["type"] for one in operator.runs())
        faults += [f"{states['RUNNING']} runs are still running"] if states["RUNNING"] else []
        operator.close_pages()
    for fault in faults:
        print("fault:", fault)
    for part in PARTS:
        record.add("servers", part, {"kills": killed[part]}, more=args.more)
    record.add("servers", "all", {"kills": killed.total(), "faults": len(faults), "seed": args.seed}, more=args.more)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main()
