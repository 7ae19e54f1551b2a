"""The guard between a shell and a command: it ends with the shell, and leaves Ctrl-C to the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stages import supervise

COMMAND = """
import signal, sys, time
try:
    print("started", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(7)
"""


def start() -> subprocess.Popen[str]:
    """A shell that runs the guard, as the recipes of make do."""
    guard = f"'{sys.executable}' -P '{supervise.__file__}' $$ 5 '{sys.executable}' -c '{COMMAND}' || exit $?"
    process = subprocess.Popen(["bash", "-c", guard], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_ctrl_c_is_left_to_the_command() -> None:
    shell = start()
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.wait(timeout=30) == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux sends the signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_command_ends_with_the_shell(number: signal.Signals) -> None:
    shell = start()
    tree = psutil.Process(shell.pid).children(recursive=True)
    assert [Path(one.exe()).name.startswith("python") for one in tree] == [True, True]
    shell.send_signal(number)
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert alive == []
    shell.wait()
