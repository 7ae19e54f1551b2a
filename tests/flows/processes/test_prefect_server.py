"""The page of the Prefect server that leads to MLflow, whose address is told only with the credential."""

from __future__ import annotations

import base64
from pathlib import Path

from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.processes.environment import UiLock
from flows.processes.prefect_server import SignIn
from flows.processes.servers import RECORD, USER


def test_address_of_mlflow_is_told_only_with_the_credential(tmp_path: Path) -> None:
    client = TestClient(SignIn(PlainTextResponse("Prefect"), "password", tmp_path))
    credential = {"authorization": f"Basic {base64.b64encode(f'{USER}:password'.encode()).decode()}"}
    wrong = {"authorization": f"Basic {base64.b64encode(f'{USER}:guess'.encode()).decode()}"}
    page = client.get(RECORD)
    assert (page.status_code, f'fetch("{RECORD}/address"' in page.text) == (200, True)
    lock = UiLock(tmp_path)
    assert lock.acquire(prefect="http://127.0.0.1:4200")
    assert client.get(f"{RECORD}/address", headers=credential).status_code == 404  # MLflow is not served
    lock.announce(mlflow="http://127.0.0.1:5000/key/")
    assert client.get(f"{RECORD}/address", headers=credential).text == "http://127.0.0.1:5000/key/"
    for headers in ({}, wrong):
        refused = client.get(f"{RECORD}/address", headers=headers)
        assert (refused.status_code, "key/" in refused.text) == (401, False)
    assert client.get("/api/version").text == "Prefect"
