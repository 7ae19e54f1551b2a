"""Kills of stages: `python -m benchmarks.reliability.kills --count 100 --seed 1`.

A checkout with a tiny model runs `dvc repro` once without kills. In another, each run gets SIGKILL, SIGTERM or SIGINT
at a random moment: the stage alone, DVC, or the whole process group as by Ctrl-C; then it is run again. Whenever the
pipeline is complete, its outputs must equal those of the first checkout bit for bit, `dvc status` must be clean, the
store must have one finished run per result and none that still runs, and no process may be left. Then the stages are
deleted and begin anew.

A kill whose process had ended meanwhile is not counted. A kill of DVC may cut off its list of files in use, which it
can't read then ("cut locks"); `sft repro` removes such a list, and so does this measurement.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.reliability import record
from stages.cli.repro import remove_cut_lock
from tests.test_pipeline import call, change_params, environment, make_project

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NOT_COMPARED = ("timings", "report.html", "evaluation.html", "data.html", "promotion.html", "lineage.json")
"""Parts of paths of files that contain times, or the id of the recorded run."""


def outputs(project: Path) -> dict[str, bytes]:
    """Return the contents of all files of `outs/` and `reports/metrics/`, by path."""
    files = [file for folder in ("outs", "reports/metrics") for file in sorted((project / folder).rglob("*"))]
    named = {file.relative_to(project).as_posix(): file for file in files if file.is_file()}
    # `outs/publish` names the run in the store
    return {
        name: file.read_bytes()
        for name, file in named.items()
        if "publish" not in name and not any(part in name for part in NOT_COMPARED)
    }


def start(project: Path) -> subprocess.Popen[bytes]:
    """Start `dvc repro` in a process group of its own."""
    log = (project.parent / "repro.log").open("ab")
    with log:
        return subprocess.Popen(
            ["dvc", "repro"],
            cwd=project,
            env={**environment(), "SFT_LIVE_RUN": "on"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stage_of(repro: subprocess.Popen[bytes]) -> tuple[str, psutil.Process] | None:
    """Return the name and the process of the stage that runs, if there is one."""
    with suppress(psutil.Error):
        for process in psutil.Process(repro.pid).children(recursive=True):
            with suppress(psutil.Error):
                line = process.cmdline()
                if "stages" in line and line[line.index("stages") - 1] == "-m":
                    return line[line.index("stages") + 1], process
    return None


def kill_once(repro: subprocess.Popen[bytes], rng: random.Random) -> str | None:
    """Send a signal at a random moment; return which one, to whom and in which stage; None if all had ended."""
    deadline = time.monotonic() + rng.choice((rng.uniform(0, 6), rng.uniform(0, 25)))
    while time.monotonic() < deadline and repro.poll() is None:
        time.sleep(0.02)
    if repro.poll() is not None:
        return None
    found = stage_of(repro)
    name = found[0] if found else "between stages"
    number, whom = rng.choice(SIGNALS), rng.choice(("stage", "dvc", "group"))
    try:
        if whom == "stage" and found:
            found[1].send_signal(number)
        elif whom == "group":
            os.killpg(repro.pid, number)
        else:
            whom = "dvc"
            repro.send_signal(number)
    except (psutil.Error, ProcessLookupError):
        return None
    return f"{number.name} {whom} {name}"


def wait_for_all(repro: subprocess.Popen[bytes], seconds: float = 120) -> list[str]:
    """Wait until DVC and all of its stages have ended; return the command lines of those that have not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        repro.poll()
        left = [process for process in psutil.process_iter(["cmdline"]) if _in_session(process, repro.pid)]
        if not left:
            return []
        time.sleep(0.1)
    lines = [" ".join(process.info["cmdline"] or ()) for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    repro.wait()
    return lines


def _in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def check(project: Path, whole: dict[str, bytes]) -> list[str]:
    """Return what is wrong with a complete pipeline."""
    found = outputs(project)
    wrong = [f"{name} differs" for name in sorted(found.keys() | whole.keys()) if found.get(name) != whole.get(name)]
    if "up to date" not in call(project, "dvc", "status"):
        wrong.append("dvc status is not clean")
    code = (
        "from mlflow import MlflowClient; c = MlflowClient('sqlite:///mlflow.db'); "
        "print(*[r.info.status + ':' + r.data.tags.get('sft.progress', '') for r in "
        "c.search_runs([e.experiment_id for e in c.search_experiments()])])"
    )
    states = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment(), capture_output=True, text=True, check=True
    ).stdout.split()
    if states.count("FINISHED:published") != 1 or any(state.startswith("RUNNING") for state in states):
        wrong.append(f"runs in the store: {states}")
    return wrong


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600, help="time after which the last pipeline is finished")
    parser.add_argument("--folder", type=Path, help="folder for the checkouts, which stay there")
    parser.add_argument("--more", action="store_true", help="count in addition to what is recorded")
    # a shell starts commands in the background with SIGINT ignored, which what is started here would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = parser.parse_args()
    rng, ends = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    folder = args.folder or Path(tempfile.mkdtemp(prefix="sft-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    first = make_project(folder / "whole")
    change_params(first, {"train": {"max_steps": 40, "save_steps": 2, "eval_steps": 20}})
    call(first, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qam", "more steps")
    fresh = shutil.copytree(first, folder / "fresh", symlinks=True)
    call(first, "dvc", "repro")
    whole = outputs(first)
    killed, faults, complete, cut = Counter[str](), list[str](), 0, 0
    while killed.total() < args.count and time.monotonic() < ends:
        project = shutil.copytree(fresh, folder / "killed", symlinks=True)
        while True:
            repro = start(project)
            done = None
            if killed.total() < args.count and time.monotonic() < ends:
                done = kill_once(repro, rng)
                print(time.strftime("%X"), done, flush=True)
                killed.update([done] if done else [])
            if done is None:
                repro.wait()
            # DVC leaves SIGINT to the stage that runs, which gets it, too, from a terminal
            left = wait_for_all(repro, 900 if done and done.startswith("SIGINT dvc") else 120)
            faults += [f"after {done}, this still ran: {line}" for line in left]
            if repro.returncode == 0:
                break
            if done is None and remove_cut_lock(project):
                cut += 1
                continue
            if done is None:  # nothing was killed, so it must have completed
                log = (folder / "repro.log").read_text(errors="replace").splitlines()[-30:]
                faults.append("a run without a kill failed:\n" + "\n".join(log))
                break
        wrong = check(project, whole) if repro.returncode == 0 else []
        faults += wrong
        complete += 1
        print(f"complete after {killed.total()} kills; wrong: {wrong}", flush=True)
        shutil.rmtree(project)
    for fault in faults:
        print("fault:", fault)
    summarize(killed, faults, {"pipelines completed": complete, "cut locks of DVC": cut}, args.seed, more=args.more)
    if args.folder is None:
        shutil.rmtree(folder)


def summarize(killed: Counter[str], faults: list[str], others: dict[str, int], seed: int, *, more: bool) -> None:
    """Store the figures: kills per stage."""
    stages = Counter[str]()
    signals: dict[str, Counter[str]] = {}
    for kill, count in killed.items():
        number, _, stage = kill.split(" ", 2)
        stages[stage] += count
        signals.setdefault(stage, Counter())[number] += count
    rows = [(stage, stages[stage], signals[stage]) for stage in sorted(stages)]
    total = sum((signals[stage] for stage in stages), Counter[str]())
    for name, count, numbers in [*rows, ("all", killed.total(), total)]:
        figures = {"kills": count, **{number.name: numbers[number.name] for number in SIGNALS}}
        if name == "all":
            figures |= {**others, "faults": len(faults), "seed": seed}
        record.add("kills", name, figures, more=more)


if __name__ == "__main__":
    main()
