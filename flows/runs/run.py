"""A run of the pipeline: checked before it starts, then run stage by stage, in the checkout or in a worktree."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from flows.runs.comparison import read_comparison
from flows.runs.dvc_stage import Listener, Outcome, StageFailed, run_stage
from flows.runs.forms import (
    Overrides,
    overridden,
    refuse_overrides_without_effect,
)
from flows.runs.graph import Plan, read_plan
from flows.runs.isolated_checkout import isolated_checkout, refuse_uncommitted
from flows.runs.report import CurvePage, Pages, ProgressBar, Row, RunReport, read_headline
from stages.checkout.code import write_code_digests
from stages.checkout.worktree import prune
from stages.cli.run_cache import prefer_cached_results
from stages.params.assignments import apply_overrides
from stages.progress import Report

PUBLISH = "publish"
NUM_RETRIES = 2
RETRY_DELAY_S = 5


def was_killed(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether a stage was killed from outside (out of memory, pre-emption), so that it is worth a retry."""
    return state.name == Outcome.KILLED


@task(
    task_run_name="{stage}",
    retries=NUM_RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=was_killed,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def stage_task(root: Path, stage: str, force: bool, variables: dict[str, str]) -> State[Any]:
    """Run one stage of dvc.yaml; the name of the state is its `Outcome`."""
    bar, curve = ProgressBar(stage), CurvePage(stage)

    def show(report: Report) -> None:
        bar.show(report)
        curve.show(report)

    listener = Listener(on_line=get_run_logger().info, on_progress=show, on_page=Pages(stage).show)
    try:
        outcome = run_stage(root, stage, listener, force, **variables, **flow_run_variables())
    except StageFailed as failure:
        return Failed(message=str(failure), name=Outcome.KILLED if failure.killed else Outcome.FAILED)
    except TerminationSignal:  # Prefect would call it a crash of the task; `run_plan` raises it again for the flow
        return Cancelled(message=f"{stage} was ended with its flow run; what is in the cache and checkpoints is kept")
    return Completed(name=outcome, message=read_headline(root, stage) or bar.text)


def flow_run_variables() -> dict[str, str]:
    """Return the environment variables with the flow run's id and URL, to which the records of stages link."""
    return {"SFT_FLOW_RUN_ID": str(runtime.flow_run.id), "SFT_FLOW_RUN_URL": str(runtime.flow_run.ui_url)}


def prune_worktrees(flow: Any, flow_run: Any, state: Any) -> None:
    """Remove the worktrees of runs that were cancelled or crashed."""
    prune(Path.cwd())


@dataclass(frozen=True)
class PreparedRun:
    """A run that can be started.

    Args:
        root: The checkout.
        plan: The stages to run.
        given: Earlier stages whose outs are used as they are.
        params_text: params.yaml with the overrides applied; None if there are none.
    """

    root: Path
    plan: Plan
    given: list[str]
    params_text: str | None


def prepare_run(root: Path, from_stage: str | None, to_stage: str | None, overrides: Overrides) -> PreparedRun:
    """Check the arguments of a run before anything is started.

    Raises:
        RunRefused: A stage is unknown, an override has no effect, or code for an isolated run is not committed.
        ParamsError: params.yaml with the overrides is not valid.
    """
    write_code_digests(root)
    full = read_plan(root)
    plan = full.between(from_stage, to_stage)
    given = plan.inputs_from_outside(full)
    values = overridden(overrides)
    if not values:
        return PreparedRun(root, plan, given, None)
    refuse_overrides_without_effect(values, plan)
    refuse_uncommitted(root, plan)
    return PreparedRun(root, plan, given, apply_overrides((root / "params.yaml").read_text(encoding="utf-8"), values))


def execute_run(prepared: PreparedRun, force: bool, report: RunReport) -> str | None:
    """Run in the checkout, or in a worktree if params are overridden; return what `run_plan` returns."""
    with workplace(prepared) as (folder, variables):
        return run_plan(folder, prepared.plan, force, report, variables)


@contextmanager
def workplace(prepared: PreparedRun) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the folder in which a run works and the extra environment variables of its stages.

    A worktree, which a run with overrides works in, is removed after the block.
    """
    if prepared.params_text is None:
        yield prepared.root, {}
        return
    name = str(runtime.flow_run.id)
    with isolated_checkout(prepared.root, name, prepared.params_text, prepared.plan, prepared.given) as copy:
        yield copy, {"SFT_STATE_DIR": str(prepared.root / ".state")}


def run_plan(root: Path, plan: Plan, force: bool, report: RunReport, variables: dict[str, str]) -> str | None:
    """Run stages in order up to the first that fails; return why it failed, or None if none did.

    Raises:
        TerminationSignal: The flow run was cancelled, or its process got SIGTERM.
    """
    problem: str | None = None
    if not force:
        for line in prefer_cached_results(root):
            print(line, flush=True)
    for name in plan.names:
        if problem is not None:
            report.rows.append(Row(name, Outcome.NOT_RUN))
            continue
        started = time.monotonic()
        state: State[Any] = stage_task(root, name, force, variables, return_state=True)
        if state.is_cancelled():
            raise TerminationSignal(signal.SIGTERM)
        outcome = next((known for known in Outcome if known == state.name), Outcome.FAILED)
        problem = None if state.is_completed() else state.message or "no reason given"
        figures = (state.message or "") if problem is None else ""
        report.rows.append(Row(name, outcome, time.monotonic() - started, figures))
        if name == PUBLISH and problem is None:
            report.comparison = read_comparison(root)
    return problem
