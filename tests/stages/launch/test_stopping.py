"""Ctrl-C and SIGTERM: none is lost, not in destructors, not in a bare `except`, not while Python starts or ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.stages.data_root import ROWS, DataRoot
from tests.stages.test_main import change
from tests.stages.tiny_run import REPO

BEGIN = """
import atexit, os, signal, sys, time
from stages.launch.stopping import heed_signals, stoppable

number = int(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit that it is ignored
heed_signals()

def send():
    os.kill(os.getpid(), number)
    time.sleep(0.01)

def work_on():
    print("works on", flush=True)
    time.sleep(60)
    return 0
"""
DESTRUCTOR = """
class Loud:
    def __del__(self):
        send()

def work():
    Loud()
    return work_on()

sys.exit(stoppable(work))
"""
BARE_EXCEPT = """
def work():
    try:
        send()
    except:
        pass
    return work_on()

sys.exit(stoppable(work))
"""
OTHER_ERROR = """
def work():
    try:
        send()
    except BaseException as error:
        raise RuntimeError("something failed") from error

sys.exit(stoppable(work))
"""
CLEAN_UP = """
def work():
    try:
        send()
    finally:
        print("cleaned up", flush=True)

sys.exit(stoppable(work))
"""
AT_EXIT = """
atexit.register(send)
sys.exit(stoppable(lambda: 0))
"""
STARTER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = "from stages.launch.stopping import heed_signals; import time; heed_signals(); time.sleep(600)"


def end_of(script: str, number: int) -> tuple[int, str]:
    command = [sys.executable, "-c", BEGIN + script, str(int(number))]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_whose_exception_is_swallowed_comes_again(number: signal.Signals) -> None:
    assert end_of(DESTRUCTOR, number) == (128 + number, "works on\n")
    assert end_of(BARE_EXCEPT, number) == (128 + number, "works on\n")
    assert end_of(OTHER_ERROR, number) == (128 + number, "")


def test_signal_lets_the_work_clean_up_and_one_while_python_exits_ends_the_process() -> None:
    assert end_of(CLEAN_UP, signal.SIGTERM) == (143, "cleaned up\n")
    assert end_of(AT_EXIT, signal.SIGINT) == (-signal.SIGINT, "")
    assert end_of(AT_EXIT, signal.SIGTERM) == (-signal.SIGTERM, "")


@pytest.mark.slow
def test_signal_at_any_moment_of_a_stage_ends_it_with_another_code_than_success(tmp_path: Path) -> None:
    root = DataRoot(tmp_path / "root")
    root.write("train.jsonl", ROWS)
    change(root)
    command = [sys.executable, "-m", "stages", "load", "--root", str(root.paths.root)]
    started = time.monotonic()
    assert subprocess.run(command, cwd=REPO, capture_output=True).returncode == 0
    duration = time.monotonic() - started
    for part in range(8):
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(duration * part / 10)
        number = (signal.SIGINT, signal.SIGTERM)[part % 2]
        alive = process.poll() is None
        process.send_signal(number)
        printed = process.communicate()[1]
        assert not alive or process.returncode in (-number, 128 + number), (part, process.returncode, printed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux sends the signal")
def test_stage_ends_with_the_dvc_that_started_it_even_if_that_is_killed() -> None:
    environment = {**os.environ, "DVC_STAGE": "train"}
    command = [sys.executable, "-c", STARTER, CHILD]
    starter = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = psutil.Process(int(starter.stdout.readline()))
    time.sleep(1)
    assert child.is_running()
    starter.kill()
    starter.wait()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert alive == []
