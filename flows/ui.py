"""`python -m flows.ui`: serve the Prefect and MLflow pages of this checkout, from which flows can be started.

All servers listen on loopback only and end with this process, however it ends. Each has a credential that changes at
every start; the printed links contain it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
import urllib.parse
from pathlib import Path
from types import FrameType

from flows.processes.environment import UiLock, child_environment, prefect_home
from flows.processes.mlflow_server import KEY, STORE
from flows.processes.servers import (
    HOST,
    USER,
    PrefectApi,
    ServerFailed,
    Servers,
    check_port,
    get,
    mlflow_server_command,
    prefect_server_command,
    prefect_variables,
    sign_in_link,
)
from stages.access.guard import new_key
from stages.checkout.redaction import redact
from stages.params.assignments import load_with_assignments
from stages.params.schema import ParamsError, PublishSection
from stages.tracking.address import VIEW, VIEW_TAG

WORK_POOL = "local"

SHOWN = ("publish.tracking_uri", "publish.experiment")
"""Values of params.yaml that decide what the pages show."""


def serve(root: Path, prefect_port: int, mlflow_port: int, publish: PublishSection) -> None:
    """Start all servers, print their addresses, and run until a signal or a failure.

    Args:
        root: The checkout.
        prefect_port: Port of the Prefect server.
        mlflow_port: Port of the MLflow server.
        publish: Which store the MLflow server shows, and which experiment.

    Raises:
        ServerFailed: A port is in use, a process failed, or the pages of this checkout are being served already.
    """
    tracking_uri = _tracking_uri(root, publish.tracking_uri)
    prefect_url, mlflow_url = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    credential, mlflow_key = f"{USER}:{new_key()}", new_key()
    lock = UiLock(root)
    if not lock.acquire(prefect=prefect_url):
        holder = lock.holder()
        raise ServerFailed(
            f"the pages of this checkout are already served: {holder.get('prefect')} (process {holder.get('pid')})"
        )
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        check_port(port, option)
    servers = Servers(root, _environment(root, prefect_url, credential))
    api = PrefectApi(f"{prefect_url}/api", credential)
    try:
        print("starting Prefect and MLflow ...", flush=True)
        servers.start("prefect", *prefect_server_command(prefect_port))
        if tracking_uri is not None:
            servers.start("mlflow", *mlflow_server_command(mlflow_port), **{KEY: mlflow_key, STORE: tracking_uri})
        servers.wait_for("prefect", f"{prefect_url}/api/health")
        servers.run("work-pool", "prefect", "work-pool", "create", WORK_POOL, "--type", "process", "--overwrite")
        end_orphaned_runs(root, api)
        servers.run("deploy", "prefect", "--no-prompt", "deploy", "--all")
        servers.start("worker", "python", "-m", "flows.processes.worker", WORK_POOL)
        if tracking_uri is not None:
            servers.wait_for("mlflow", f"{mlflow_url}/health")
        form_link = sign_in_link(prefect_url, credential, _form_page(api))
        mlflow_link = f"{mlflow_url}/{mlflow_key}/" if tracking_uri is not None else ""
        lock.announce(prefect=form_link, api_url=api.url, credential=credential, mlflow=mlflow_link)
        print(_welcome(root, publish, form_link, mlflow_link), flush=True)
        while True:
            servers.check()
            time.sleep(1)
    finally:
        print("stopping ...", flush=True)
        servers.stop()


def end_orphaned_runs(root: Path, api: PrefectApi) -> None:
    """Set the flow runs of killed workers to Crashed; they would stay Running and block runs that wait for their turn.

    While this process has the lock of the pages, no worker of this checkout is running. That is not known if the user
    has set another Prefect home, whose runs are therefore left alone.
    """
    if "PREFECT_HOME" in os.environ and Path(os.environ["PREFECT_HOME"]) != prefect_home(root):
        return
    alive = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    at_work = {"flow_runs": alive, "work_pools": {"name": {"any_": [WORK_POOL]}}}
    of_workers = api.post("/flow_runs/filter", at_work)
    parents = [run["id"] for run in of_workers]
    children = {"flow_runs": {**alive, "parent_flow_run_id": {"any_": parents}}}
    within = api.post("/flow_runs/filter", children) if parents else []
    for run in [*within, *of_workers]:
        state = {
            "type": "CRASHED",
            "message": "its worker has ended; finished stages are kept: run it again",
        }
        api.post(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def read_publish(root: Path, assignments: list[str]) -> PublishSection:
    """Return the section `publish` of params.yaml with the values of `--set`.

    Raises:
        ParamsError: A value is not valid, or the pages do not depend on it.
    """
    for assignment in assignments:
        if assignment.partition("=")[0].strip() not in SHOWN:
            raise ParamsError(f"--set {assignment}: the pages depend only on {' and '.join(SHOWN)}")
    return load_with_assignments(root / "params.yaml", assignments).publish


def _tracking_uri(root: Path, uri: str) -> str | None:
    """Return the store for the MLflow server; None if params.yaml names a server."""
    if uri.startswith(("http://", "https://")):
        return None
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(f"{prefix}/"):
        return f"{prefix}{root / uri.removeprefix(prefix)}"
    return uri


def _environment(root: Path, prefect_url: str, credential: str) -> dict[str, str]:
    return child_environment(
        **prefect_variables(prefect_url, credential),
        PREFECT_HOME=os.environ.get("PREFECT_HOME", str(prefect_home(root))),
        # MLflow's job execution is not used; without it, the server starts in a third of the time with 0.5 GB less
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        # interval at which the worker looks for runs; the default is ten seconds
        PREFECT_WORKER_QUERY_SECONDS="2",
    )


def _welcome(root: Path, publish: PublishSection, form_link: str, mlflow_link: str) -> str:
    runs = _runs_page(mlflow_link, publish.experiment) if mlflow_link else redact(publish.tracking_uri)
    return "\n".join(
        [
            "",
            f"  Prefect  start a run: {form_link}",
            f"  MLflow   {runs}",
            f"  logs     {root / '.state' / 'logs'}",
            "",
            "The links sign you in; keep them to yourself. Ctrl-C stops everything.",
        ]
    )


def _form_page(api: PrefectApi) -> str:
    deployment = api.get("/deployments/name/pipeline/pipeline")
    return "/deployments" if deployment is None else f"/deployments/deployment/{deployment['id']}/run"


def _runs_page(mlflow_link: str, experiment: str) -> str:
    """Return the page with the table of runs; MLflow's front page if there is no run yet."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    found = get(f"{mlflow_link}api/2.0/mlflow/experiments/get-by-name?{query}")
    if found is None:
        return mlflow_link
    experiment_facts = json.loads(found)["experiment"]
    page = f"{mlflow_link}#/experiments/{experiment_facts['experiment_id']}/runs?workflowType=machine_learning"
    tags = {tag["key"] for tag in experiment_facts.get("tags", [])}
    return f"{page}&viewStateShareKey={VIEW}" if VIEW_TAG in tags else page


def variables(root: Path) -> dict[str, str]:
    """Return the environment variables by which the commands `prefect` and `mlflow` use the servers of `sft ui`.

    Raises:
        ServerFailed: The pages of this checkout are not being served.
    """
    pages = UiLock(root).holder()
    if "api_url" not in pages:
        raise ServerFailed("the pages of this checkout are not being served; type `sft ui` in another terminal first")
    found = {"PREFECT_API_URL": pages["api_url"], "PREFECT_API_AUTH_STRING": pages["credential"]}
    if pages["mlflow"]:
        address, key = pages["mlflow"].rstrip("/").rsplit("/", 1)
        found |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_TOKEN": key}
    return found


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return 0 then, or 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description="Prefect and MLflow pages on loopback")
    parser.add_argument("--prefect-port", type=int, default=4200, metavar="PORT", help="default: 4200")
    parser.add_argument("--mlflow-port", type=int, default=5000, metavar="PORT", help="default: 5000")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help=f"replace a value of params.yaml while the pages are served: {' or '.join(SHOWN)}",
    )
    parser.add_argument(
        "--environment",
        action="store_true",
        help="serve nothing: print the variables by which `prefect` and `mlflow` in a shell use the running servers",
    )
    args = parser.parse_args(argv)
    if args.environment and args.set:
        parser.error("--set belongs to pages that are started; --environment starts none")
    signal.signal(signal.SIGTERM, _interrupt)
    root = Path.cwd().resolve()
    try:
        if args.environment:
            print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables(root).items()))
            return 0
        serve(root, args.prefect_port, args.mlflow_port, read_publish(root, args.set))
    except KeyboardInterrupt:
        return 0
    except (ServerFailed, ParamsError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
