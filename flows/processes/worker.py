"""`python -m flows.processes.worker POOL`: a Prefect worker that only runs the deployments of this checkout.

A deployment on a server can name any command, environment, folder, pull step or entrypoint. Prefect's own worker runs
all of that, so whoever can write to the server can run commands here. This one takes the id and the parameters of a run
from the server, and everything else from `prefect.yaml`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import anyio.abc
from ruamel.yaml import YAML

from flows.processes.environment import ROOT, prepare_prefect

prepare_prefect()

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.runner._flow_run_executor import FlowRunExecutionResult, FlowRunExecutorContext
from prefect.runner._process_manager import ProcessHandle
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.states import Failed
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

SET_FOLDER = "prefect.deployments.steps.set_working_directory"


class RunRefusedByWorker(RuntimeError):
    """A run asks for something else than a deployment of this checkout."""


def read_entrypoints(root: Path) -> dict[str, set[str]]:
    """Return the file and function of each flow that `prefect.yaml` deploys, by the name of the deployment."""
    entries = YAML(typ="safe", pure=True).load((root / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    found: dict[str, set[str]] = {}
    for entry in entries:
        found.setdefault(entry["name"], set()).add(entry["entrypoint"])
    return found


def find_entrypoint(root: Path, asked: DeploymentResponse | None, run: FlowRun) -> str:
    """Return the file and function of the flow that a run is of.

    Args:
        root: The checkout.
        asked: The run's deployment, as the server has it; None if the run has none.
        run: The run.

    Raises:
        RunRefusedByWorker: `prefect.yaml` has no such deployment, or the server's one or the run asks for more.
    """
    if asked is None:
        raise RunRefusedByWorker("the run has no deployment, and this worker runs those of prefect.yaml only")
    entrypoints = read_entrypoints(root).get(asked.name)
    if entrypoints is None:
        raise RunRefusedByWorker(
            f"{root / 'prefect.yaml'} has no deployment {asked.name!r}; add it there and start `sft ui` again"
        )
    differing = {
        "entrypoint": asked.entrypoint if asked.entrypoint not in entrypoints else None,
        "pull_steps": [step for step in asked.pull_steps or [] if not _only_sets_folder(step, root)],
        "path": asked.path if asked.path and Path(root, asked.path).resolve() != root.resolve() else None,
        "job_variables": {**(asked.job_variables or {}), **(run.job_variables or {})},
    }
    more = ", ".join(f"{name}={value!r}" for name, value in differing.items() if value)
    if more:
        raise RunRefusedByWorker(
            f"the deployment {asked.name!r} or the run asks for {more}, which {root / 'prefect.yaml'} does not; "
            "start `sft ui` again, which deploys it anew, and leave the run's job variables empty"
        )
    return str(asked.entrypoint)


def _only_sets_folder(step: dict[str, Any], root: Path) -> bool:
    """Whether a pull step only changes to the checkout, in which the worker runs anyway."""
    return set(step) == {SET_FOLDER} and step[SET_FOLDER] == {"directory": str(root)}


class CheckoutJobConfiguration(ProcessJobConfiguration):
    """How a run is started: by this interpreter, in this checkout, with the worker's own environment."""

    entrypoint: str = ""

    @classmethod
    async def resolve_for_flow_run(
        cls,
        flow_run: FlowRun,
        *,
        client: PrefectClient,
        work_pool: WorkPool,
        worker_name: str,
        worker_id: UUID | None = None,
        deployment: DeploymentResponse | None = None,
    ) -> CheckoutJobConfiguration:
        """Return the configuration of a run, without the templates and variables that the server has for it.

        Raises:
            RunRefusedByWorker: The run is not one of this checkout's deployments.
        """
        if deployment is None and flow_run.deployment_id:
            deployment = await client.read_deployment(flow_run.deployment_id)
        configuration = cls(entrypoint=find_entrypoint(ROOT, deployment, flow_run), working_dir=ROOT)
        flow = await client.read_flow(flow_run.flow_id)
        configuration.prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, worker_id)
        return configuration


class CheckoutWorker(ProcessWorker):
    """Worker that only runs the deployments of this checkout."""

    job_configuration = CheckoutJobConfiguration

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "checkout"  # in Prefect's registry, beside the worker of the pool's type

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Run a flow of this checkout; set another run to Failed and say why."""
        try:
            deployment = await self.client.read_deployment(flow_run.deployment_id) if flow_run.deployment_id else None
            find_entrypoint(ROOT, deployment, flow_run)
        except RunRefusedByWorker as refusal:
            self.get_flow_run_logger(flow_run).error(f"refused: {refusal}")
            self._submitting_flow_run_ids.discard(flow_run.id)
            self._release_limit_slot(flow_run.id)
            await self.client.set_flow_run_state(flow_run.id, Failed(message=f"refused: {refusal}"), force=True)
            return
        except ObjectNotFound:
            pass  # deleted meanwhile, which Prefect's own method says
        await super()._submit_run(flow_run)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run a flow of this checkout in a process.

        Prefect's own method would prepare the process by the deployment as the server has it by then.
        """
        assert isinstance(configuration, CheckoutJobConfiguration)
        started = anyio.TASK_STATUS_IGNORED if task_status is None else task_status

        async def resolve_flow(run: FlowRun) -> Flow[Any, Any]:
            return load_flow_from_entrypoint(configuration.entrypoint, use_placeholder_flow=False)

        execution: FlowRunExecutionResult | None = None
        async with FlowRunExecutorContext() as context:
            starter = EngineCommandStarter(
                entrypoint=configuration.entrypoint,
                cwd=ROOT,
                env=configuration.env,
                stream_output=configuration.stream_output,
                control_channel=context.control_channel,
                # a signal to the group would reach the flow before the reason for it
                isolate_process_group=True,
                env_overrides_settings=True,
            )
            executor = context.create_executor(flow_run, starter, resolve_flow=resolve_flow, propose_submitting=False)

            async def execute(*, task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED) -> None:
                nonlocal execution
                execution = await executor.submit(task_status=task_status)

            async with anyio.create_task_group() as group:
                handle = await group.start(execute)
                started.started(handle.pid)
        if execution is None or execution.status_code is None:
            raise RuntimeError("the process of the flow run could not be started")
        return ProcessWorkerResult(status_code=execution.status_code, identifier=str(execution.handle.pid))

    async def _submit_adhoc_run(self, *args: Any, **kwargs: Any) -> None:
        raise RunRefusedByWorker("this worker runs the deployments of prefect.yaml only")


def main(argv: list[str]) -> int:
    """Run the worker of a pool until a signal."""
    setup_signal_handlers_worker(os.getpid(), "the worker", print)
    worker = CheckoutWorker(work_pool_name=argv[0], name=f"checkout {ROOT.name}")
    with contextlib.suppress(KeyboardInterrupt):
        anyio.run(worker.start)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
