"""Which runs the worker of `make ui` takes, by deployments as a real Prefect server has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows.processes.worker import RunRefusedByWorker, find_entrypoint, read_entrypoints

SHELL = "prefect.deployments.steps.run_shell_script"
FOLDER = "prefect.deployments.steps.set_working_directory"
YAML = """\
deployments:
  - {name: pipeline, entrypoint: "flows/pipeline.py:pipeline"}
  - {name: nightly, entrypoint: "flows/nightly.py:nightly"}
  - {name: nightly, entrypoint: "flows/sweep.py:sweep"}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "prefect.yaml").write_text(YAML)
    return tmp_path


def refusal(root: Path, run_variables: dict[str, Any] | None = None, **changes: Any) -> str:
    """Why the worker refuses the run of a deployment; empty if it does not."""
    known = {"name": "pipeline", "entrypoint": "flows/pipeline.py:pipeline", "work_pool_name": "local"}
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="local", type="process"), overwrite=True)
        flow = client.create_flow_from_name(f"{root.parent.name}-{root.name}-{len(changes)}-{'-'.join(changes)}")
        made = client.create_deployment(flow, **{**known, **changes})
        run = client.create_flow_run_from_deployment(made, job_variables=run_variables)
        deployment = client.read_deployment(made)
    try:
        assert find_entrypoint(root, deployment, run) == deployment.entrypoint
    except RunRefusedByWorker as refused:
        return str(refused)
    return ""


def test_deployments_are_those_of_prefect_yaml(root: Path) -> None:
    assert read_entrypoints(root) == {
        "pipeline": {"flows/pipeline.py:pipeline"},
        "nightly": {"flows/nightly.py:nightly", "flows/sweep.py:sweep"},
    }


@pytest.mark.usefixtures("prefect_server")
def test_a_run_of_a_known_deployment_is_taken(root: Path) -> None:
    assert refusal(root) == ""
    assert refusal(root, pull_steps=[{FOLDER: {"directory": str(root)}}], path=str(root)) == ""
    assert refusal(root, name="nightly", entrypoint="flows/sweep.py:sweep") == ""


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"entrypoint": "flows/nightly.py:nightly"}, "entrypoint='flows/nightly.py:nightly'"),
        ({"pull_steps": [{SHELL: {"script": "id"}}]}, f"pull_steps=[{{'{SHELL}': {{'script': 'id'}}}}]"),
        ({"pull_steps": [{FOLDER: {"directory": "/"}}]}, f"pull_steps=[{{'{FOLDER}': {{'directory': '/'}}}}]"),
        ({"path": "/"}, "path='/'"),
        ({"path": "/no/such/folder"}, "path='/no/such/folder'"),
        ({"job_variables": {"command": "id"}}, "job_variables={'command': 'id'}"),
        ({"run_variables": {"env": {"A": "b"}}}, "job_variables={'env': {'A': 'b'}}"),
    ],
)
def test_a_run_that_asks_for_more_is_refused(root: Path, changes: dict[str, Any], shown: str) -> None:
    place = root / "prefect.yaml"
    assert refusal(root, **changes) == (
        f"the deployment 'pipeline' or the run asks for {shown}, which {place} does not; "
        "start `sft ui` again, which deploys it anew, and leave the run's job variables empty"
    )


@pytest.mark.usefixtures("prefect_server")
def test_a_run_of_an_unknown_deployment_or_of_none_is_refused(root: Path) -> None:
    place = root / "prefect.yaml"
    assert refusal(root, name="evil") == (f"{place} has no deployment 'evil'; add it there and start `sft ui` again")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            client.create_deployment(client.create_flow_from_name("f"), "pipeline")
        )
    with pytest.raises(RunRefusedByWorker, match="the run has no deployment"):
        find_entrypoint(root, None, run)
