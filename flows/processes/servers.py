"""Prefect and MLflow servers as child processes that end with this process."""

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
    """A server could not be started or used."""


@dataclass
class Servers:
    """Long-running child processes, which are stopped in reverse order: the worker before the server it reports to.

    Args:
        root: The checkout.
        environment: Environment variables of all processes.
        running: The running processes by name.
    """

    root: Path
    environment: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        """Return the file with the output of a process."""
        return self.root / ".state" / "logs" / f"{name}.log"

    def start(self, name: str, *command: str) -> None:
        """Start a long-running process."""
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("wb") as log:
            self.running[name] = start_supervised(_tool(*command), self.root, self.environment, log)

    def run(self, name: str, *command: str) -> None:
        """Run a command to its end.

        Raises:
            ServerFailed: It failed, or a long-running process ended meanwhile.
        """
        self.start(name, *command)
        while self.running[name].poll() is None:
            self.check(except_for=name)
            time.sleep(POLL_S)
        if self.running.pop(name).returncode != 0:
            raise ServerFailed(f"{name} failed:\n{self._tail(name)}")

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a server answers.

        Raises:
            ServerFailed: It did not answer in time, or a process ended.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while get(url) is None:
            self.check()
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"{name} did not answer at {url} within {START_TIMEOUT_S:.0f} s; see {self.log(name)}"
                )
            time.sleep(POLL_S)

    def check(self, except_for: str = "") -> None:
        """Check that every long-running process is running.

        Raises:
            ServerFailed: One has ended.
        """
        for name, process in self.running.items():
            if name != except_for and process.poll() is not None:
                raise ServerFailed(f"{name} ended with exit code {process.returncode}:\n{self._tail(name)}")

    def stop(self) -> None:
        """Stop all processes and their descendants."""
        while self.running:
            end_supervised(self.running.popitem()[1])

    def _tail(self, name: str, num_lines: int = 15) -> str:
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["  " + line for line in lines[-num_lines:]] + [f"  (full log: {self.log(name)})"])


def start_own_prefect_server(root: Path) -> str:
    """Start a Prefect server that runs until this process ends, and return the address of its API.

    Prefect would start one itself, but that server keeps running if the flow is killed. It is stopped at exit and not
    earlier, because Prefect delivers logs and events until then.
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
    """Return the command that starts a Prefect server on loopback."""
    return ["prefect", "server", "start", "--host", HOST, "--port", str(port)]


def check_port(port: int, option: str) -> None:
    """Check that a port is free.

    Raises:
        ServerFailed: It is in use; the message names the option that sets another.
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
    """Send a JSON body to a server and return its JSON answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def get(url: str) -> bytes | None:
    """Return the body of a page; None if there is no such page or no answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bytes(response.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
