"""`supervise.py PARENT_PID GRACE_S COMMAND...`: run a command whose process tree ends with it or with the parent.

DVC leaves its stage running when it gets a SIGTERM, and a killed flow can't clean up at all. This process runs between
the two: it adopts orphans, gets a signal from the kernel when its parent ends, and ends all its descendants (SIGTERM,
then SIGKILL), including those in other sessions. Ctrl-C, which a terminal sends to `make repro` and all below it, is
left to the command. It is a separate, single-threaded program, because `preexec_fn` is
unsafe in a process with threads, and every flow has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05


def main(argv: list[str]) -> int:
    """Run `argv[2:]` as a child of this process, which is a child of process `argv[0]`.

    Returns:
        The command's exit code; 128 plus the signal's number if a signal ended it.
    """
    parent_pid, grace_s, command = int(argv[0]), float(argv[1]), argv[2:]
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _leave_to_command)
    _tie_to_parent()
    if os.getppid() != parent_pid:
        return 128 + signal.SIGTERM
    code = 128 + signal.SIGTERM
    try:
        code = subprocess.Popen(command).wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(grace_s)
    return code if code >= 0 else 128 - code


def end_descendants(grace_s: float) -> None:
    """End all descendants of this process: SIGTERM, and SIGKILL after `grace_s` seconds; return when none is left."""
    deadline = time.monotonic() + grace_s
    asked: set[psutil.Process] = set()
    while True:
        _reap_adopted()
        remaining = psutil.Process().children(recursive=True)
        if not remaining:
            return
        overdue = time.monotonic() > deadline
        for process in remaining:
            if overdue or process not in asked:
                _send(process, signal.SIGKILL if overdue else signal.SIGTERM)
        asked.update(remaining)
        time.sleep(POLL_S)


def _reap_adopted() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _tie_to_parent() -> None:
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_CHILD_SUBREAPER, 1), (PR_SET_PDEATHSIG, int(signal.SIGTERM))):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def _leave_to_command(number: int, frame: FrameType | None) -> None:
    """Do nothing; the command would inherit `SIG_IGN`, but not this function."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
