"""An engine as a child process on loopback, with a random port and key, that never outlives its caller."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import stages.supervise
from stages.engines.programs import HOST, Command

START_S = 900.0
"""Seconds that an engine may take to load its model."""

GRACE_S = 10
"""Seconds between SIGTERM and SIGKILL of an engine."""

KEY_VARIABLES = ("VLLM_API_KEY", "LLAMA_API_KEY", "SFT_SERVE_API_KEY")
"""Variables by which the engines are given their key."""

LAST_LINES = 12
"""Lines of an engine's output that an error shows."""


@dataclass(frozen=True)
class Running:
    """An engine that answers.

    Args:
        address: Its address, such as `http://127.0.0.1:8000`.
        key: The key that requests need.
        start_s: Seconds until it answered.
        wait: Wait until it ends by itself, which raises `EngineFailed`.
    """

    address: str
    key: str
    start_s: float
    wait: Callable[[], None] = lambda: None


class EngineFailed(ValueError):
    """An engine that did not start, or ended; the message has the end of its output."""


def free_port() -> int:
    """Return a port on loopback that no process listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(engine: str, command: Command, port: int, key: str | None = None) -> Iterator[Running]:
    """Start an engine, wait until it answers, and end it with all its processes.

    It runs in a session of its own, so that Ctrl-C reaches this process alone, and under `supervise.py`, which ends it
    if this process is killed.

    Args:
        engine: Its name, for messages.
        command: How it is started.
        port: The port that the command names.
        key: The key that requests need; None = a random one.

    Raises:
        EngineFailed: It ended, or did not answer in time.
    """
    key = key or secrets.token_urlsafe(24)
    variables = {**os.environ, **command.variables, **dict.fromkeys(KEY_VARIABLES, key)}
    variables |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    variables.pop("PYTHONPATH", None)
    guard = [sys.executable, "-P", str(Path(stages.supervise.__file__)), str(os.getpid()), str(GRACE_S)]
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*guard, *command.words],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def failure(why: str) -> EngineFailed:
            log.seek(0)
            return EngineFailed(f"the engine {engine} {why}; its last lines:\n{_last_lines(log.read())}")

        def wait() -> None:
            process.wait()
            raise failure("ended")

        try:
            address = f"http://{HOST}:{port}"
            while not _is_ready(address):
                seconds = time.monotonic() - started
                if process.poll() is not None or seconds > START_S:
                    raise failure(f"did not answer within {START_S:.0f} s" if process.poll() is None else "ended")
                time.sleep(0.25)
            yield Running(address, key, time.monotonic() - started, wait)
        finally:
            _end(process)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_S + 5)
    process.kill()
    process.wait()


def _last_lines(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "Traceback" not in line]
    shown = [*errors[-2:], *lines[-LAST_LINES:]] if not set(errors[-2:]) <= set(lines[-LAST_LINES:]) else lines
    return "\n".join(f"  {line[:300]}" for line in shown[-LAST_LINES - 2 :])
