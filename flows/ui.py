"""`python -m flows.ui`: the Prefect and MLflow pages of this checkout, with the pipeline ready to be started.

Everything listens on loopback only and ends with this process, however it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from flows.environment import UiLock, child_environment, prefect_home
from flows.supervised import end_supervised, start_supervised
from stages.params import ParamsError, load_params

HOST = "127.0.0.1"
WORK_POOL = "local"
START_TIMEOUT_S = 180.0
POLL_S = 0.25


class UiFailed(RuntimeError):
    """The pages can't be shown; the message says why and what to do."""


@dataclass
class Servers:
    """The processes of the pages, ended in reverse order so that the worker goes before the server it reports to.

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
            raise UiFailed(f"{name} failed:\n{self._tail(name)}")

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a server answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            self.check()
            if time.monotonic() > deadline:
                raise UiFailed(f"{name} did not answer at {url} within {START_TIMEOUT_S:.0f} s; see {self.log(name)}")
            time.sleep(POLL_S)

    def check(self, except_for: str = "") -> None:
        """Raise if a process that should stay has ended."""
        for name, process in self.running.items():
            if name != except_for and process.poll() is not None:
                raise UiFailed(f"{name} ended with exit code {process.returncode}:\n{self._tail(name)}")

    def stop(self) -> None:
        """End all of them, each with everything it started."""
        while self.running:
            end_supervised(self.running.popitem()[1])

    def _tail(self, name: str, num_lines: int = 15) -> str:
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["  " + line for line in lines[-num_lines:]] + [f"  (all of it: {self.log(name)})"])


def serve(root: Path, prefect_port: int, mlflow_port: int) -> None:
    """Start everything, say where it is, and stay until a signal or a failure.

    Raises:
        UiFailed: A port is taken, a process failed, or the pages of this checkout are open already.
    """
    tracking_uri = _tracking_uri(root)
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        refuse_busy_port(port, option)
    prefect_url, mlflow_url = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    lock = UiLock(root)
    if not lock.acquire(api_url=f"{prefect_url}/api", prefect=prefect_url, mlflow=mlflow_url):
        holder = lock.holder()
        raise UiFailed(f"the pages of this checkout are open: {holder.get('prefect')} (process {holder.get('pid')})")
    servers = Servers(root, _environment(root, prefect_url))
    try:
        print("starting Prefect and MLflow ...", flush=True)
        servers.start("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port))
        if tracking_uri is not None:
            servers.start("mlflow", *_mlflow_command(tracking_uri, mlflow_port))
        servers.wait_for("prefect", f"{prefect_url}/api/health")
        servers.run("work-pool", "prefect", "work-pool", "create", WORK_POOL, "--type", "process", "--overwrite")
        servers.run("deploy", "prefect", "--no-prompt", "deploy", "--all")
        servers.start("worker", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process")
        if tracking_uri is not None:
            servers.wait_for("mlflow", f"{mlflow_url}/health")
        print(_welcome(root, prefect_url, mlflow_url if tracking_uri is not None else None), flush=True)
        while True:
            servers.check()
            time.sleep(1)
    finally:
        print("stopping ...", flush=True)
        servers.stop()


def refuse_busy_port(port: int, option: str) -> None:
    """Find out before anything is started whether a port is taken.

    Raises:
        UiFailed: Names the port and the option that chooses another.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UiFailed(f"port {port} can't be used ({error.strerror}); choose another with {option}") from None


def _tracking_uri(root: Path) -> str | None:
    """The store that MLflow shows; None when another server already shows it."""
    uri = load_params(root / "params.yaml").publish.tracking_uri
    if uri.startswith(("http://", "https://")):
        return None
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(f"{prefix}/"):
        return f"{prefix}{root / uri.removeprefix(prefix)}"
    return uri


def _mlflow_command(tracking_uri: str, port: int) -> list[str]:
    address = ["--host", HOST, "--port", str(port)]
    return ["mlflow", "server", *address, "--workers", "1", "--backend-store-uri", tracking_uri]


def _environment(root: Path, prefect_url: str) -> dict[str, str]:
    return child_environment(
        PREFECT_API_URL=f"{prefect_url}/api",
        PREFECT_HOME=os.environ.get("PREFECT_HOME", str(prefect_home(root))),
        # Off, MLflow starts in a third of the time and half a gigabyte less; its jobs are not used here.
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        # How often the worker looks for runs; its default is ten seconds.
        PREFECT_WORKER_QUERY_SECONDS="2",
        # The entrypoint is a file; this lets it import its package.
        PYTHONPATH=str(root),
    )


def _tool(*command: str) -> list[str]:
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


def _answers(url: str) -> bool:
    return _get(url) is not None


def _get(url: str) -> bytes | None:
    """The body of a page; None when it is not there, or nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bytes(response.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None


def _welcome(root: Path, prefect_url: str, mlflow_url: str | None) -> str:
    publish = load_params(root / "params.yaml").publish
    return "\n".join(
        [
            "",
            f"  Prefect  {prefect_url}",
            f"           start a run: {_form_page(prefect_url)}",
            f"  MLflow   {publish.tracking_uri if mlflow_url is None else _runs_page(mlflow_url, publish.experiment)}",
            f"  logs     {root / '.state' / 'logs'}",
            "",
            "Ctrl-C stops everything.",
        ]
    )


def _form_page(prefect_url: str) -> str:
    deployment = _get(f"{prefect_url}/api/deployments/name/pipeline/pipeline")
    if deployment is None:
        return f"{prefect_url}/deployments"
    return f"{prefect_url}/deployments/deployment/{json.loads(deployment)['id']}/run"


def _runs_page(mlflow_url: str, experiment: str) -> str:
    """The table of runs; MLflow's own front page is that of another kind of use. Before the first run there is none."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    found = _get(f"{mlflow_url}/api/2.0/mlflow/experiments/get-by-name?{query}")
    if found is None:
        return mlflow_url
    number = json.loads(found)["experiment"]["experiment_id"]
    return f"{mlflow_url}/#/experiments/{number}/runs?workflowType=machine_learning"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns 0 then, 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description="Prefect and MLflow pages on loopback")
    parser.add_argument("--prefect-port", type=int, default=4200, metavar="PORT", help="default: 4200")
    parser.add_argument("--mlflow-port", type=int, default=5000, metavar="PORT", help="default: 5000")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        serve(Path.cwd().resolve(), args.prefect_port, args.mlflow_port)
    except KeyboardInterrupt:
        return 0
    except (UiFailed, ParamsError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
