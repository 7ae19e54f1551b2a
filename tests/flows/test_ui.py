from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.environment import ROOT, UiLock, child_environment
from flows.ui import main
from tests.flows.conftest import commit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(url: str, data: dict[str, Any] | None = None) -> Any:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


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
    assert "the pages of this checkout are open: http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.slow
def test_pages_open_run_a_deployment_and_leave_nothing_behind(project: Path) -> None:
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
