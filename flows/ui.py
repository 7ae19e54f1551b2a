"""`python -m flows.ui`: serve the Prefect and MLflow pages of this checkout, from which flows can be started.

All servers listen on loopback only and end with this process, however it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.parse
from pathlib import Path
from types import FrameType

from flows.processes.environment import UiLock, child_environment, prefect_home
from flows.processes.servers import HOST, ServerFailed, Servers, check_port, get, post, prefect_server_command
from stages.checkout.redaction import redact
from stages.params.schema import ParamsError, load_params

WORK_POOL = "local"


def serve(root: Path, prefect_port: int, mlflow_port: int) -> None:
    """Start all servers, print their addresses, and run until a signal or a failure.

    Args:
        root: The checkout.
        prefect_port: Port of the Prefect server.
        mlflow_port: Port of the MLflow server.

    Raises:
        ServerFailed: A port is in use, a process failed, or the pages of this checkout are being served already.
    """
    tracking_uri = _tracking_uri(root)
    prefect_url, mlflow_url = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    lock = UiLock(root)
    if not lock.acquire(prefect=prefect_url):
        holder = lock.holder()
        raise ServerFailed(
            f"the pages of this checkout are already served: {holder.get('prefect')} (process {holder.get('pid')})"
        )
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        check_port(port, option)
    servers = Servers(root, _environment(root, prefect_url))
    try:
        print("starting Prefect and MLflow ...", flush=True)
        servers.start("prefect", *prefect_server_command(prefect_port))
        if tracking_uri is not None:
            servers.start("mlflow", *_mlflow_command(tracking_uri, mlflow_port))
        servers.wait_for("prefect", f"{prefect_url}/api/health")
        servers.run("work-pool", "prefect", "work-pool", "create", WORK_POOL, "--type", "process", "--overwrite")
        end_orphaned_runs(root, prefect_url)
        servers.run("deploy", "prefect", "--no-prompt", "deploy", "--all")
        servers.start("worker", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process")
        if tracking_uri is not None:
            servers.wait_for("mlflow", f"{mlflow_url}/health")
        lock.announce(prefect=prefect_url, api_url=f"{prefect_url}/api")
        print(_welcome(root, prefect_url, mlflow_url if tracking_uri is not None else None), flush=True)
        while True:
            servers.check()
            time.sleep(1)
    finally:
        print("stopping ...", flush=True)
        servers.stop()


def end_orphaned_runs(root: Path, prefect_url: str) -> None:
    """Set the flow runs of killed workers to Crashed; they would stay Running and block runs that wait for their turn.

    While this process has the lock of the pages, no worker of this checkout is running. That is not known if the user
    has set another Prefect home, whose runs are therefore left alone.
    """
    if "PREFECT_HOME" in os.environ and Path(os.environ["PREFECT_HOME"]) != prefect_home(root):
        return
    api = f"{prefect_url}/api/flow_runs"
    alive = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    of_workers = post(f"{api}/filter", {"flow_runs": alive, "work_pools": {"name": {"any_": [WORK_POOL]}}})
    parents = [run["id"] for run in of_workers]
    within = post(f"{api}/filter", {"flow_runs": {**alive, "parent_flow_run_id": {"any_": parents}}}) if parents else []
    for run in [*within, *of_workers]:
        state = {
            "type": "CRASHED",
            "message": "its worker has ended; finished stages are kept: run it again",
        }
        post(f"{api}/{run['id']}/set_state", {"state": state, "force": True})


def _tracking_uri(root: Path) -> str | None:
    """Return the store for the MLflow server; None if params.yaml names a server."""
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
        # MLflow's job execution is not used; without it, the server starts in a third of the time with 0.5 GB less
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        # interval at which the worker looks for runs; the default is ten seconds
        PREFECT_WORKER_QUERY_SECONDS="2",
        # the entrypoint is a file, which imports the package `flows`
        PYTHONPATH=str(root),
    )


def _welcome(root: Path, prefect_url: str, mlflow_url: str | None) -> str:
    publish = load_params(root / "params.yaml").publish
    runs = redact(publish.tracking_uri) if mlflow_url is None else _runs_page(mlflow_url, publish.experiment)
    return "\n".join(
        [
            "",
            f"  Prefect  {prefect_url}",
            f"           start a run: {_form_page(prefect_url)}",
            f"  MLflow   {runs}",
            f"  logs     {root / '.state' / 'logs'}",
            "",
            "Ctrl-C stops everything.",
        ]
    )


def _form_page(prefect_url: str) -> str:
    deployment = get(f"{prefect_url}/api/deployments/name/pipeline/pipeline")
    if deployment is None:
        return f"{prefect_url}/deployments"
    return f"{prefect_url}/deployments/deployment/{json.loads(deployment)['id']}/run"


def _runs_page(mlflow_url: str, experiment: str) -> str:
    """Return the page with the table of runs; MLflow's front page if there is no run yet."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    found = get(f"{mlflow_url}/api/2.0/mlflow/experiments/get-by-name?{query}")
    if found is None:
        return mlflow_url
    number = json.loads(found)["experiment"]["experiment_id"]
    return f"{mlflow_url}/#/experiments/{number}/runs?workflowType=machine_learning"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return 0 then, or 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description="Prefect and MLflow pages on loopback")
    parser.add_argument("--prefect-port", type=int, default=4200, metavar="PORT", help="default: 4200")
    parser.add_argument("--mlflow-port", type=int, default=5000, metavar="PORT", help="default: 5000")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        serve(Path.cwd().resolve(), args.prefect_port, args.mlflow_port)
    except KeyboardInterrupt:
        return 0
    except (ServerFailed, ParamsError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
