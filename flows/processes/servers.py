"""Prefect and MLflow servers as child processes that end with this process."""

from __future__ import annotations

import atexit
import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from flows.processes.environment import child_environment, open_private
from flows.processes.supervised import end_supervised, start_supervised
from stages.access.guard import new_key
from stages.checkout.code import CODE
from stages.checkout.redaction import redact

HOST = "127.0.0.1"
USER = "sft"
"""Name of the user for all servers, whose password is random and changes at every start."""

SIGN_IN = "/sign-in"
"""Path of the page that signs a browser in. No browser sends what follows `#` in an address to a server."""

RECORD = "/record"
"""Path of the page that leads to MLflow's server of the same `sft ui`, whose address has a key. What follows `#` in the
link is the place there."""

START_TIMEOUT_S = 180.0
POLL_S = 0.25
LAST_LINES_S = 5.0
"""Time to wait for the last lines of a process that has ended."""


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
    _writers: dict[str, threading.Thread] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        """Return the file with the output of a process."""
        return self.root / ".state" / "logs" / f"{name}.log"

    def start(self, name: str, *command: str, **variables: str) -> None:
        """Start a long-running process, with further environment variables that the other processes do not get."""
        environment = {**self.environment, **variables}
        log = open_private(self.log(name), os.O_WRONLY | os.O_TRUNC)
        process = start_supervised(_tool(*command), self.root, environment, subprocess.PIPE)
        # the servers' libraries print addresses with passwords, and what they were asked
        writer = threading.Thread(target=_write_log, args=(process, log, environment), daemon=True)
        writer.start()
        self.running[name], self._writers[name] = process, writer

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
            name, process = self.running.popitem()
            end_supervised(process)
            self._writers[name].join(POLL_S)

    def _tail(self, name: str, num_lines: int = 15) -> str:
        self._writers[name].join(LAST_LINES_S)
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["  " + line for line in lines[-num_lines:]] + [f"  (full log: {self.log(name)})"])


def _write_log(process: subprocess.Popen[bytes], log: IO[bytes], environment: dict[str, str]) -> None:
    """Write what a process prints to its log, without secrets, until its output is closed."""
    assert process.stdout is not None
    with log, process.stdout:
        for line in process.stdout:
            with suppress(OSError):  # a full disk must not block the server, which waits until its output is read
                log.write(redact(line.decode(errors="replace"), environment).encode())


def start_own_prefect_server(root: Path) -> tuple[str, str]:
    """Start a Prefect server that runs until this process ends.

    Prefect would start one itself, but that server keeps running if the flow is killed, and it answers every web page.
    It is stopped at exit and not earlier, because Prefect delivers logs and events until then.

    Returns:
        The address of its API, and the credential that it asks for.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    url, credential = f"http://{HOST}:{port}", f"{USER}:{new_key()}"
    servers = Servers(root, child_environment(**prefect_variables(url, credential)))
    atexit.register(servers.stop)
    servers.start("prefect", *prefect_server_command(port))
    servers.wait_for("prefect", f"{url}/api/health")
    return f"{url}/api", credential


def prefect_variables(url: str, credential: str) -> dict[str, str]:
    """Return the environment variables of a Prefect server on loopback and of the processes that use it.

    Args:
        url: Address of the server.
        credential: What it asks for: a user, a colon and a password.
    """
    return {
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_API_AUTH_STRING": credential,
        "PREFECT_SERVER_API_AUTH_STRING": credential,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url,
        # of the same origin also where a tunnel leads to the page
        "PREFECT_UI_API_URL": "/api",
        **_python_path(),
    }


def _python_path() -> dict[str, str]:
    """Return the variable by which children find a checkout's code: a flow's entrypoint is a file that imports it.

    An installed package is found without it; in front of Python's own modules, its neighbours could hide them.
    """
    if CODE.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))}


def prefect_server_command(port: int) -> list[str]:
    """Return the command that starts a Prefect server on loopback."""
    return ["python", "-m", "flows.processes.prefect_server", str(port)]


def mlflow_server_command(port: int) -> list[str]:
    """Return the command that starts an MLflow server on loopback."""
    return ["python", "-m", "flows.processes.mlflow_server", str(port)]


def sign_in_link(url: str, credential: str, page: str) -> str:
    """Return the link that signs a browser in to a Prefect server and opens a page, such as `/deployments`."""
    return f"{url}{SIGN_IN}#{credential.partition(':')[2]}{page}"


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


@dataclass
class PrefectApi:
    """Client of a Prefect server for the few requests that are not worth the seconds that importing Prefect takes.

    Args:
        url: Address of the API.
        credential: What the server asks for.
    """

    url: str
    credential: str

    def get(self, path: str) -> Any:
        """Return the JSON answer of a page; None if there is no such page or no answer."""
        answer = get(self.url + path, self._authorization())
        return None if answer is None else json.loads(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a JSON body and return the JSON answer."""
        headers = {"content-type": "application/json", **self._csrf(), **self._authorization()}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def _authorization(self) -> dict[str, str]:
        return {"authorization": f"Basic {base64.b64encode(self.credential.encode()).decode()}"}

    def _csrf(self) -> dict[str, str]:
        client = str(uuid.uuid4())
        token = self.get(f"/csrf-token?client={client}")
        return {"prefect-csrf-client": client, "prefect-csrf-token": token["token"]} if token else {}


def get(url: str, headers: dict[str, str] | None = None) -> bytes | None:
    """Return the body of a page; None if there is no such page or no answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=5) as response:
            return bytes(response.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
