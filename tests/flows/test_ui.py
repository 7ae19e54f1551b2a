from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL
from prefect.states import Pending, Running

from flows.processes.environment import ROOT, UiLock, child_environment, prefect_home
from flows.processes.servers import PrefectApi
from flows.ui import end_orphaned_runs, main
from tests.flows.conftest import commit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(project: Path, path: str, data: dict[str, Any] | None = None) -> Any:
    """Ask the Prefect server of `make ui`; a busy one is asked again, as Prefect's own client does."""
    pages = UiLock(project).holder()
    api = PrefectApi(pages["api_url"], pages["credential"])
    for wait_s in (0.5, 1, 2, 4, 8, None):
        try:
            return api.get(path) if data is None else api.post(path, data)
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or wait_s is None:
                raise
            time.sleep(wait_s)
    return None


def test_busy_port_is_named_with_the_option_that_changes_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        code = main(["--prefect-port", str(free_port()), "--mlflow-port", str(port)])

    assert code == 1
    assert f"port {port} can't be used (Address already in use); choose another with --mlflow-port" in (
        capsys.readouterr().err
    )


def test_pages_that_are_open_already_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert UiLock(project).holder() == {}
    lock = UiLock(project)
    assert lock.acquire(prefect="http://127.0.0.1:1")

    code = main(["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())])

    assert code == 1
    assert "the pages of this checkout are already served: http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.usefixtures("prefect_server")
def test_runs_of_a_killed_worker_end_when_the_pages_are_served_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = PrefectApi(str(PREFECT_API_URL.value()), "")
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="local", type="process"), overwrite=True)
        flow = client.create_flow_from_name("orphaned")
        deployment = client.create_deployment(flow, "d", work_pool_name="local", concurrency_limit=1)
        left = client.create_flow_run_from_deployment(deployment).id
        for state in (Pending(), Running()):
            client.set_flow_run_state(left, state)
        waiting = client.create_flow_run_from_deployment(deployment).id
        assert client.set_flow_run_state(waiting, Pending()).status.value == "REJECT"  # it is not its turn

        end_orphaned_runs(project, api)  # another Prefect home: runs are left alone
        assert client.read_flow_run(left).state_name == "Running"
        monkeypatch.setenv("PREFECT_HOME", str(prefect_home(project)))
        end_orphaned_runs(project, api)

        assert client.read_flow_run(left).state_name == "Crashed"
        assert client.read_flow_run(waiting).state.is_scheduled()
        assert client.set_flow_run_state(waiting, Pending(), force=False).status.value == "ACCEPT"


@pytest.mark.slow
def test_pages_run_a_deployment_and_no_process_remains(project: Path) -> None:
    with serve_pages(project, schedules=True) as pages:
        deployment = fetch(project, "/deployments/name/pipeline/pipeline")
        assert f"{pages.prefect}/sign-in#" in pages.printed
        assert f"/deployments/deployment/{deployment['id']}/run" in pages.printed
        asked = {"parameters": {"to_stage": "pack", "overrides": {"pack": {"max_length": 256}}}}
        run_id = fetch(project, f"/deployments/{deployment['id']}/create_flow_run", asked)["id"]
        state = wait_for_end(project, run_id)
        assert (state["type"], state["message"]) == ("COMPLETED", "2 completed")
        scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        assert fetch(project, "/flow_runs/filter", scheduled)
        with urllib.request.urlopen(f"{pages.mlflow}/health", timeout=30) as response:
            assert response.status == 200
        tree = psutil.Process(pages.process.pid).children(recursive=True)
    assert pages.process.returncode == 0
    assert [process for process in tree if process.is_running()] == []


@dataclass
class Pages:
    """The pages of a project, served by `make ui`."""

    process: subprocess.Popen[str]
    printed: str
    prefect: str
    mlflow: str


@contextmanager
def serve_pages(project: Path, *, schedules: bool = False) -> Iterator[Pages]:
    """Serve the pages of a project, with this repository's code, until the end of the block."""
    for package in ("flows", "stages", "sft"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    (project / "prefect.yaml").write_text(text.replace("active: false", "active: true") if schedules else text)
    commit(project)
    ports = {"--prefect-port": free_port(), "--mlflow-port": free_port()}
    ui = subprocess.Popen(
        [sys.executable, "-m", "flows.ui", *(str(word) for option in ports.items() for word in option)],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ui.stdout is not None
    try:
        printed = []
        for line in ui.stdout:
            printed.append(line)
            if "Ctrl-C" in line:
                break
        yield Pages(ui, "".join(printed), *(f"http://127.0.0.1:{port}" for port in ports.values()))
    finally:
        ui.send_signal(signal.SIGTERM)
        ui.wait(timeout=90)


def environment() -> dict[str, str]:
    """The environment of a user who has not set a Prefect home."""
    return {name: value for name, value in child_environment().items() if name != "PREFECT_HOME"}


def wait_for_end(project: Path, run_id: str) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = fetch(project, f"/flow_runs/{run_id}")["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(0.5)
    raise AssertionError("the run did not end")
