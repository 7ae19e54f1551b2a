"""prefect.yaml and the templates of work pools, read by Prefect itself and held against its current schema."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import prefect
import pytest
from docker.types import HostConfig
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL
from ruamel.yaml import YAML

from flows.processes.environment import ROOT, child_environment
from tests.flows.conftest import commit

POOLS = ROOT / "flows" / "pools"
WORKERS = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"


def template(kind: str) -> dict[str, Any]:
    return json.loads((POOLS / f"{kind}.json").read_text(encoding="utf-8"))


def current(kind: str) -> dict[str, Any]:
    """The template that this version of Prefect knows for a kind of worker."""
    found = json.loads(WORKERS.read_text(encoding="utf-8"))
    return found[f"prefect-{kind}"][kind]["default_base_job_configuration"]


def placeholders(value: Any) -> set[str]:
    """Names in double braces anywhere in a template."""
    if isinstance(value, dict):
        return set().union(*map(placeholders, value.values()), set())
    if isinstance(value, list):
        return set().union(*map(placeholders, value), set())
    return set(re.findall(r"{{ (\w+) }}", value)) if isinstance(value, str) else set()


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_template_has_all_that_prefect_knows_and_defines_what_it_uses(kind: str) -> None:
    ours, theirs = template(kind), current(kind)
    assert theirs["job_configuration"].keys() <= ours["job_configuration"].keys()
    assert theirs["variables"]["properties"].keys() <= ours["variables"]["properties"].keys()
    assert placeholders(ours["job_configuration"]) <= ours["variables"]["properties"].keys()
    more = {"docker": {"container_create_kwargs"}, "kubernetes": {"gpus", "shared_memory", "volume_claim"}}[kind]
    assert ours["variables"]["properties"].keys() - theirs["variables"]["properties"].keys() == more
    # a variable that nothing uses would be a promise that is not kept
    assert more <= placeholders(ours["job_configuration"])


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_server_takes_the_template(kind: str) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=f"gpu-{kind}", type=kind, base_job_template=template(kind)))
        assert client.read_work_pool(f"gpu-{kind}").base_job_template == template(kind)


def test_jobs_ask_for_gpus() -> None:
    pod = template("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }
    assert template("kubernetes")["variables"]["properties"]["gpus"]["default"] == 1
    asked = template("docker")["variables"]["properties"]["container_create_kwargs"]["default"]
    host = HostConfig(version="1.44", device_requests=asked["device_requests"], shm_size=asked["shm_size"])
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert host["ShmSize"] == 8 * 2**30


def deployments() -> list[dict[str, Any]]:
    return YAML(typ="safe").load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


def test_every_flow_has_a_deployment_and_every_parameter_a_description() -> None:
    assert [entry["name"] for entry in deployments()] == ["pipeline", "sweep", "nightly", "cleanup"]
    for entry in deployments():
        file, _, name = entry["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        schema = flow.parameters.model_dump_for_openapi()
        assert all(shown.get("description") and shown.get("title") for shown in schema["properties"].values()), name
        assert set(entry["parameters"]) <= schema["properties"].keys()
        for schedule in entry.get("schedules", []):
            assert set(schedule.get("parameters", {})) <= schema["properties"].keys()


@pytest.mark.usefixtures("prefect_server")
def test_prefect_deploys_all_of_them_and_schedules_create_runs(project: Path) -> None:
    for package in ("flows", "stages", "sft"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    (project / "prefect.yaml").write_text(text.replace("active: false", "active: true"), encoding="utf-8")
    commit(project)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="local", type="process"), overwrite=True)
        environment = child_environment(PREFECT_API_URL=str(PREFECT_API_URL.value()))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        deployed = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        found = {each.name: each for each in client.read_deployments() if "sft" in each.tags}
        assert sorted(found) == ["cleanup", "nightly", "pipeline", "sweep"]
        for name in ("pipeline", "nightly", "cleanup"):
            client.request("POST", "/deployments/{id}/schedule", path_params={"id": found[name].id})
        planned = {each.deployment_id: each for each in client.read_flow_runs() if each.state_name == "Scheduled"}
    assert {found[name].id for name in ("pipeline", "nightly", "cleanup")} <= planned.keys()
    assert planned[found["cleanup"].id].parameters == {"remove": True}
    assert {found[name].enforce_parameter_schema for name in found} == {True}
