"""Two users: `sudo python -m benchmarks.reliability.users --count 200 --kills 20`.

Processes of two users, with a umask that hides what they make, take the lock of trainings (`SFT_LOCK_DIR`) in turns;
some are killed while they hold it. While one trains, no other may, and after every kill another user must get the
lock. Only root can start processes of two users.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.reliability import record

USERS = (54321, 54322)
WORKER = """
import os, random, sys, time
from pathlib import Path
import torch
from stages.launch.lock import sole_training
folder, user, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.umask(0o077)
os.setgroups([])
os.setgid(user)
os.setuid(user)
rng, marker = random.Random(seed), folder / "marker"

def lives(process):
    # one that was killed has released the lock shortly before the kernel removes it
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True

for _ in range(count):
    with sole_training(folder / str(user)):
        try:
            inside = int(os.readlink(marker))
        except OSError:
            inside = 0
        if inside and lives(inside):
            print("OVERLAP", inside, flush=True)
        marker.unlink(missing_ok=True)
        marker.symlink_to(str(os.getpid()))  # made in one step
        time.sleep(rng.uniform(0, 0.02))
        marker.unlink()
    print("TRAINED", flush=True)
    time.sleep(rng.uniform(0, 0.02))
"""


def start(folder: Path, user: int, count: int, seed: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a process of a user that trains so many times."""
    environment = {**os.environ, "PYTHONPATH": str(record.ROOT), "SFT_LOCK_DIR": str(folder / "locks")}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(user), str(count), seed],
            cwd="/",
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="trainings of each user")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("only root can start processes of two users")
    rng, killed, wanted = random.Random(args.seed), 0, len(USERS) * args.count
    with tempfile.TemporaryDirectory(prefix="sft-users-") as name:
        folder, log = Path(name), Path(name) / "log"
        folder.chmod(0o777)
        (folder / "locks").mkdir()
        (folder / "locks").chmod(0o1777)
        running: dict[int, subprocess.Popen[bytes]] = {}
        deadline, trained = time.monotonic() + 600, 0
        log.touch()
        while time.monotonic() < deadline and (trained < wanted or killed < args.kills):
            for user in USERS:
                if user not in running or running[user].poll() is not None:
                    running[user] = start(folder, user, args.count, f"{args.seed}:{user}:{killed}", log)
            time.sleep(rng.uniform(0.1, 4))
            trained = log.read_text(errors="replace").count("TRAINED")
            if killed < args.kills and trained:
                running[rng.choice(USERS)].kill()
                killed += 1
        for process in running.values():
            process.kill()
            process.wait()
        said = log.read_text(errors="replace")
    overlaps, tracebacks = said.count("OVERLAP"), said.count("Traceback")
    if overlaps or tracebacks or trained < wanted:
        print(said[-4000:])
    figures = {
        "trainings": trained,
        "killed while waiting or training": killed,
        "two at once": overlaps,
        "errors": tracebacks,
        "seed": args.seed,
    }
    record.add("users", "two users, one lock", figures)
    print(figures)


if __name__ == "__main__":
    main()
