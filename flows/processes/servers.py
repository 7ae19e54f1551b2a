"""The servers that flows need, as child processes that can't outlive this one."""

from __future__ import annotations

import atexit
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.processes.environment import child_environment
from flows.processes.supervised import end_supervised, start_supervised

HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
POLL_S = 0.25


class ServerFailed(RuntimeError):
    """A server can't be used; the message says why and what to do."""


@dataclass
class Servers:
    """Child processes that stay, ended in reverse order so that the worker goes before the server it reports to.

    Args:
        root: The checkout.
        environment: What every one of them finds in its environment.
    """

    root: Path
    environment: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.root / ".state" / "logs" / f"{name}.log"

    def start(self, name: str, *command: str) -> None:
        """Start one process that stays."""
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("wb") as log:
            self.running[name] = start_supervised(_tool(*command), self.root, self.environment, log)

    def run(self, name: str, *command: str) -> None:
        """Run one command to its end."""
        self.start(name, *command)
        while self.running[name].poll() is None:
            self.check(except_for=name)
            time.sleep(POLL_S)
        if self.running.pop(name).returncode != 0:
            raise ServerFailed(f"{name} failed:\n{self._tail(name)}")

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a server answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while get(url) is None:
            self.check()
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"{name} did not answer at {url} within {START_TIMEOUT_S:.0f} s; see {self.log(name)}"
                )
            time.sleep(POLL_S)

    def check(self, except_for: str = "") -> None:
        """Raise if a process that should stay has ended."""
        for name, process in self.running.items():
            if name != except_for and process.poll() is not None:
                raise ServerFailed(f"{name} ended with exit code {process.returncode}:\n{self._tail(name)}")

    def stop(self) -> None:
        """End all of them, each with everything it started."""
        while self.running:
            end_supervised(self.running.popitem()[1])

    def _tail(self, name: str, num_lines: int = 15) -> str:
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["  " + line for line in lines[-num_lines:]] + [f"  (all of it: {self.log(name)})"])


def start_own_prefect_server(root: Path) -> str:
    """Start a Prefect server that stays until this process ends; returns the address of its API.

    Prefect starts one by itself when there is none, but leaves it behind when the run is killed. It is stopped at
    exit, not before: until then Prefect still delivers logs and events.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    servers = Servers(root, child_environment())
    atexit.register(servers.stop)
    servers.start("prefect", *prefect_server_command(port))
    servers.wait_for("prefect", f"http://{HOST}:{port}/api/health")
    return f"http://{HOST}:{port}/api"


def prefect_server_command(port: int) -> list[str]:
    """What starts a Prefect server on loopback."""
    return ["prefect", "server", "start", "--host", HOST, "--port", str(port)]


def refuse_busy_port(port: int, option: str) -> None:
    """Find out before anything is started whether a port is taken.

    Raises:
        ServerFailed: Names the port and the option that chooses another.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerFailed(f"port {port} can't be used ({error.strerror}); choose another with {option}") from None


def _tool(*command: str) -> list[str]:
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


def post(url: str, body: dict[str, Any]) -> Any:
    """What a server answers to a JSON body."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def get(url: str) -> bytes | None:
    """The body of a page; None when it is not there, or nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bytes(response.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
