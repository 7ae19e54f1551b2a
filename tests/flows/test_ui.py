from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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
from flows.ui import end_orphaned_runs, main
from tests.flows.conftest import commit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(url: str, data: dict[str, Any] | None = None) -> Any:
    """Ask a server; a busy one is asked again, as Prefect's own client does."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    for wait_s in (0.5, 1, 2, 4, 8, None):
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
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
    api = str(PREFECT_API_URL.value())
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="local", type="process"), overwrite=True)
        flow = client.create_flow_from_name("orphaned")
        deployment = client.create_deployment(flow, "d", work_pool_name="local", concurrency_limit=1)
        left = client.create_flow_run_from_deployment(deployment).id
        for state in (Pending(), Running()):
            client.set_flow_run_state(left, state)
        waiting = client.create_flow_run_from_deployment(deployment).id
        assert client.set_flow_run_state(waiting, Pending()).status.value == "REJECT"  # it is not its turn

        end_orphaned_runs(project, api.removesuffix("/api"))  # another Prefect home: runs are left alone
        assert client.read_flow_run(left).state_name == "Running"
        monkeypatch.setenv("PREFECT_HOME", str(prefect_home(project)))
        end_orphaned_runs(project, api.removesuffix("/api"))

        assert client.read_flow_run(left).state_name == "Crashed"
        assert client.read_flow_run(waiting).state.is_scheduled()
        assert client.set_flow_run_state(waiting, Pending(), force=False).status.value == "ACCEPT"


@pytest.mark.slow
def test_pages_run_a_deployment_and_no_process_remains(project: Path) -> None:
    for package in ("flows", "stages", "sft"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    prefect_yaml = (ROOT / "prefect.yaml").read_text().replace("active: false", "active: true")
    (project / "prefect.yaml").write_text(prefect_yaml)
    commit(project)
    prefect_port, mlflow_port = free_port(), free_port()
    environment = child_environment()
    environment.pop("PREFECT_HOME")
    ui = subprocess.Popen(
        [sys.executable, "-m", "flows.ui", "--prefect-port", str(prefect_port), "--mlflow-port", str(mlflow_port)],
        cwd=project,
        env=environment,
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
        assert f"http://127.0.0.1:{prefect_port}" in "".join(printed)
        api = f"http://127.0.0.1:{prefect_port}/api"
        deployment = fetch(f"{api}/deployments/name/pipeline/pipeline")
        asked = {"parameters": {"to_stage": "pack", "overrides": {"pack": {"max_length": 256}}}}
        run_id = fetch(f"{api}/deployments/{deployment['id']}/create_flow_run", asked)["id"]
        state = wait_for_end(api, run_id)
        assert (state["type"], state["message"]) == ("COMPLETED", "2 completed")
        scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        assert fetch(f"{api}/flow_runs/filter", scheduled)
        with urllib.request.urlopen(f"http://127.0.0.1:{mlflow_port}/health", timeout=30) as response:
            assert response.status == 200
    finally:
        tree = psutil.Process(ui.pid).children(recursive=True)
        ui.send_signal(signal.SIGTERM)
        code = ui.wait(timeout=90)
    assert code == 0
    assert [process for process in tree if process.is_running()] == []


def wait_for_end(api: str, run_id: str) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = fetch(f"{api}/flow_runs/{run_id}")["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(0.5)
    raise AssertionError("the run did not end")
