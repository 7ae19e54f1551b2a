"""Commands under `supervise.py`: started and ended together with all their descendants.

Between SIGTERM and SIGKILL they have SFT_GRACE_S seconds, 20 by default, in which a training saves a checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from stages import supervise
from stages.launch.stopping import grace_s


def start_supervised(
    command: list[str], root: Path, environment: dict[str, str], output: int | IO[Any]
) -> subprocess.Popen[bytes]:
    """Start a command in a new session. Its process tree is ended when the command or this process ends."""
    guard = [sys.executable, "-P", str(Path(supervise.__file__)), str(os.getpid()), str(grace_s())]
    return subprocess.Popen(
        [*guard, *command],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_supervised(command: list[str], root: Path, environment: dict[str, str], on_line: Callable[[str], None]) -> int:
    """Run a command in a new session and wait for it.

    If an exception is raised, end its process tree before re-raising.

    Args:
        command: The command.
        root: Its working directory.
        environment: Its environment variables.
        on_line: Called with every line that it prints.

    Returns:
        Its exit code; 128 plus the signal's number if a signal ended it.
    """
    process = start_supervised(command, root, environment, subprocess.PIPE)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            # a progress bar redraws itself with carriage returns: keep its last state
            on_line(line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])
        code = process.wait()
    except BaseException:
        end_supervised(process)
        raise
    finally:
        process.stdout.close()
    return code if code >= 0 else 128 - code


def end_supervised(process: subprocess.Popen[bytes]) -> None:
    """End a supervised process with its tree, and wait until it has ended."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s() + 5)
    process.kill()
    process.wait()
