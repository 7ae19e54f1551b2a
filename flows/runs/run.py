"""flows.runs.run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.runs.dvc_stage import Listener, Outcome, StageFailed, run_stage
from flows.runs.forms import (
    Overrides,
    apply_overrides,
    overridden,
    refuse_overrides_without_effect,
)
from flows.runs.graph import Plan, read_plan
from flows.runs.isolated_checkout import isolated_checkout, refuse_uncommitted
from flows.runs.report import ProgressBar, Row, RunReport, read_headline
from stages.checkout.worktree import prune

NUM_RETRIES = 2

RETRY_DELAY_S = 5


def may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Retry what was ended from outside (out of memory, pre-emption), never a mistake of a user or of the code."""
    return state.name == Outcome.KILLED


@task(
    task_run_name="{stage}",
    retries=NUM_RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def stage_task(root: Path, stage: str, force: bool, variables: dict[str, str]) -> State[Any]:
    """One stage of dvc.yaml; its state's name tells whether it ran, was restored from the cache, or was unchanged."""
    bar = ProgressBar(stage)
    listener = Listener(on_line=get_run_logger().info, on_progress=bar.show)
    try:
        outcome = run_stage(root, stage, listener, force, **variables, **flow_run_variables())
    except StageFailed as failure:
        return Failed(message=str(failure), name=Outcome.KILLED if failure.killed else Outcome.FAILED)
    return Completed(name=outcome, message=read_headline(root, stage) or bar.text)


def flow_run_variables() -> dict[str, str]:
    """What stages are told of the flow run that they belong to; what they record links to it."""
    return {"SFT_FLOW_RUN_ID": str(runtime.flow_run.id), "SFT_FLOW_RUN_URL": str(runtime.flow_run.ui_url)}


def prune_worktrees(flow: Any, flow_run: Any, state: Any) -> None:
    """Remove the worktrees of runs that were cancelled or crashed before they could do it."""
    prune(Path.cwd())


@dataclass(frozen=True)
class Asked:
    """A run that can be started.

    Args:
        root: The checkout.
        plan: The stages to run.
        given: Stages before them whose outs are taken as they are.
        params_text: params.yaml with the overrides in it; None when there are none.
    """

    root: Path
    plan: Plan
    given: list[str]
    params_text: str | None


def ask(root: Path, from_stage: str | None, to_stage: str | None, overrides: Overrides) -> Asked:
    """Check what a run is asked for, before anything is started.

    Raises:
        RunRefused: A stage is unknown, an override has no effect, or code for an isolated run is not committed.
        ParamsError: The overrides don't go together.
    """
    whole = read_plan(root)
    plan = whole.between(from_stage, to_stage)
    given = plan.inputs_from_outside(whole)
    values = overridden(overrides)
    if not values:
        return Asked(root, plan, given, None)
    refuse_overrides_without_effect(values, plan)
    refuse_uncommitted(root, plan)
    return Asked(root, plan, given, apply_overrides((root / "params.yaml").read_text(encoding="utf-8"), values))


def run_asked(asked: Asked, force: bool, report: RunReport) -> str | None:
    """Run in the checkout, or in a worktree when params are overridden; returns what `run_plan` returns."""
    with workplace(asked) as (folder, variables):
        return run_plan(folder, asked.plan, force, report, variables)


@contextmanager
def workplace(asked: Asked) -> Iterator[tuple[Path, dict[str, str]]]:
    """Where a run works, and what its stages find in their environment; a worktree is gone behind the block."""
    if asked.params_text is None:
        yield asked.root, {}
        return
    name = str(runtime.flow_run.id)
    with isolated_checkout(asked.root, name, asked.params_text, asked.plan, asked.given) as copy:
        yield copy, {"SFT_STATE_DIR": str(asked.root / ".state")}


def run_plan(root: Path, plan: Plan, force: bool, report: RunReport, variables: dict[str, str]) -> str | None:
    """Run stages in order up to the first that fails; returns why it failed, None when none did."""
    problem: str | None = None
    for name in plan.names:
        if problem is not None:
            report.rows.append(Row(name, Outcome.NOT_RUN))
            continue
        started = time.monotonic()
        state: State[Any] = stage_task(root, name, force, variables, return_state=True)
        outcome = next((known for known in Outcome if known == state.name), Outcome.FAILED)
        problem = None if state.is_completed() else state.message or "no reason given"
        figures = (state.message or "") if problem is None else ""
        report.rows.append(Row(name, outcome, time.monotonic() - started, figures))
    return problem
