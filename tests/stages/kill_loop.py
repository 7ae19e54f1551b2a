"""`python -m tests.stages.kill_loop ROOT KILLS SEED`: train in a forked process, kill it so many times, let it end."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from stages import train
from stages.checkout.paths import Paths
from stages.params.schema import load_params


def start(root: Path) -> tuple[int, int]:
    """Fork a training; its process and the pipe that it prints into."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.dup2(writing, 1)
    code = 1
    try:
        train.run(load_params(root / "params.yaml"), Paths(root))
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(root: Path, kills: int, seed: int) -> int:
    """Kill at random moments: after some progress lines and a random part of the time that follows."""
    moments = random.Random(seed)
    for number in range(kills + 1):
        process, reading = start(root)
        wait_for, delay_s = moments.randint(1, 5), moments.uniform(0.0, 0.15)
        with os.fdopen(reading) as output:
            for line in output:
                print(line, end="")
                wait_for -= line.startswith("train: ")
                if wait_for == 0 and number < kills:
                    time.sleep(delay_s)
                    os.kill(process, signal.SIGKILL)
                    print("killed after", line, end="")
        _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
