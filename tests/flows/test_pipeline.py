from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, PrefectHTTPStatusError, TerminationSignal

from flows.pipeline import main, pipeline
from flows.processes.environment import ROOT, child_environment
from flows.runs import run as module
from flows.runs.dvc_stage import Listener, Outcome, run_stage
from flows.runs.forms import parse_assignments
from flows.runs.graph import read_plan
from flows.runs.report import RunReport
from stages.checkout.worktree import prune
from tests.flows.conftest import commit, replace_param, run

pytestmark = pytest.mark.usefixtures("prefect_server")


def outcomes(printed: str) -> list[tuple[str, str]]:
    """The first two columns of the closing table."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("stage "))
    rows = [line.split("  ") for line in lines[start + 1 :] if line.startswith(("load", "pack", "train"))]
    return [(cells[0].strip(), next(cell for cell in cells[1:] if cell).strip()) for cells in rows]


def all_artifacts(state: State[Any]) -> list[Any]:
    """Those of a run, the oldest first."""
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        return sorted(client.read_artifacts(artifact_filter=of_run), key=lambda artifact: artifact.created)


def artifacts(state: State[Any]) -> dict[str, Any]:
    return {artifact.key: artifact for artifact in all_artifacts(state)}


def test_a_training_has_its_curve_and_answers_as_artifacts_while_it_trains(ran_project: Path) -> None:
    points = [(1, 2.5), (2, 1.5)]
    events = [
        {"stage": "train", "done": step, "total": 2, "part": "steps", "figures": {"loss": loss}, "point": True}
        for step, loss in points
    ]
    said = "".join(f"echo 'PROGRESS {json.dumps(event)}'\n" for event in events)
    said += "".join(f"echo 'PAGE {json.dumps(['samples', text])}'\n" for text in ("before", "after"))
    script = ran_project / "train.sh"
    script.write_text(said + script.read_text())
    found = artifacts(pipeline(return_state=True))
    assert (found["samples-train"].data, found["samples-train"].description) == ("after", "train: samples")
    curve = found["curve-train"]
    assert curve.description == "train: step 2 of 2"
    assert curve.data.splitlines() == [
        "loss: `█▁` 2.5000 to 1.5000",
        "",
        "| step | loss |",
        "|---:|---:|",
        "| 1 | 2.5000 |",
        "| 2 | 1.5000 |",
    ]


PUBLISH = """
  publish:
    cmd: bash publish.sh
    deps: [outs/train.txt, publish.sh]
    outs: [outs/publish]
"""


def test_a_published_result_has_its_comparison_with_the_champion_as_an_artifact(ran_project: Path) -> None:
    with (ran_project / "dvc.yaml").open("a", encoding="utf-8") as stages:
        stages.write(PUBLISH)
    record = json.dumps({"run_id": "a1", "comparison": "#/experiments/1"})
    said = f"mkdir -p outs/publish\necho '{record}' > outs/publish/run.json\n"
    (ran_project / "publish.sh").write_text(f"{said}echo '**B is better**' > outs/publish/since_champion.md\n")
    for outcome in ("1 completed, 3 unchanged", "4 unchanged"):
        state = pipeline(return_state=True)
        assert state.message == outcome
        compared = artifacts(state)["compared-with-champion"]
        assert compared.description == "compared with the champion"
        assert compared.data.startswith("**B is better**\n")
        assert "of the run `a1` in MLflow" in compared.data


def test_a_stage_of_a_cancelled_run_is_cancelled_and_did_not_crash(
    ran_project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ended(*arguments: Any, **variables: str) -> Outcome:
        raise TerminationSignal(signal.SIGTERM)

    monkeypatch.setattr(module, "run_stage", ended)
    state = module.stage_task(ran_project, "pack", False, {}, return_state=True)
    assert state.type == "CANCELLED"
    assert "Crash" not in caplog.text
    with pytest.raises(TerminationSignal):
        module.run_plan(ran_project, read_plan(ran_project), False, RunReport({}), {})


def test_outcomes_progress_and_closing_table(ran_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace_param(ran_project, "max_length: 512", "max_length: 256")
    first = pipeline(return_state=True)

    assert (first.type, first.message) == ("COMPLETED", "1 completed, 2 unchanged")
    assert outcomes(capsys.readouterr().out) == [("load", "Unchanged"), ("pack", "Completed"), ("train", "Unchanged")]
    found = artifacts(first)
    assert (found["progress-pack"].data, found["progress-pack"].description) == (100.0, "pack: 2 of 2 parts, whole")
    table = json.loads(found["pipeline-stages"].data)
    assert [(row["stage"], row["outcome"], row["figures"]) for row in table] == [
        ("load", "Unchanged", ""),
        ("pack", "Completed", "whole"),
        ("train", "Unchanged", "loss 1.25, rows.train 2"),
    ]
    assert "| pack | Completed |" in found["pipeline-report"].data

    replace_param(ran_project, "max_length: 256", "max_length: 512")
    assert pipeline(from_stage="pack", to_stage="pack", return_state=True).message == "1 restored"


def test_mistake_ends_the_run_with_one_line_no_traceback_and_no_retry(
    ran_project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (ran_project / "pack.sh").write_text("echo try >> ran.log; echo 'error: rows.jsonl:7: no role' >&2; exit 1")

    code = main(["--from-stage", "pack"])

    out, err = capfd.readouterr()
    assert code == 1
    assert outcomes(out) == [("pack", "Failed"), ("train", "Not run")]
    assert err.splitlines()[-1] == "error: pack: rows.jsonl:7: no role"
    assert "Traceback" not in out + err
    assert (ran_project / "ran.log").read_text().split() == ["try"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to-stage", "pakc"], "error: no stage 'pakc' in dvc.yaml; did you mean 'pack'?"),
        (["--set", "train.lora_r=0"], "error: overrides: train.lora_r: Input should be greater than or equal to 1"),
        (["--set", "merge.tolerance=1"], "error: merge.tolerance: no stage of this run reads it"),
    ],
)
def test_run_that_makes_no_sense_is_refused_before_it_exists(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_overrides_leave_the_checkout_as_it_was(ran_project: Path) -> None:
    before = {path: path.read_bytes() for path in ran_project.rglob("*") if path.is_file() and path.suffix != ".db"}

    state = pipeline(overrides=parse_assignments(["train.learning_rate=5e-4"]), return_state=True)

    assert state.message == "1 completed, 2 restored"
    assert "| `train.learning_rate` | `0.0005` |" in artifacts(state)["pipeline-report"].data
    changed = [path for path in before if path.exists() and path.read_bytes() != before[path]]
    assert [path for path in changed if not {".git", ".dvc"} & set(path.parts)] == []
    assert run(ran_project, "git", "status", "--porcelain") == ""
    assert list((ran_project / ".worktrees").iterdir()) == []

    # what was computed there is not computed again when the checkout adopts the value
    replace_param(ran_project, "learning_rate: 0.001", "learning_rate: 0.0005")
    assert run_stage(ran_project, "train", Listener(print, print)) is Outcome.RESTORED
    assert "learning_rate: 0.0005" in (ran_project / "outs" / "train.txt").read_text()


def test_killed_stage_is_tried_again(ran_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stage_task", module.stage_task.with_options(retry_delay_seconds=0))
    script = "echo try >> ran.log; cp outs/load.txt outs/pack.txt; test $(wc -l < ran.log) -gt 1 || kill -9 $$"
    (ran_project / "pack.sh").write_text(script)

    state = pipeline(from_stage="pack", to_stage="pack", return_state=True)

    assert state.message == "1 completed"
    assert (ran_project / "ran.log").read_text().split() == ["try", "try"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_flow_takes_stage_and_server_with_it(ran_project: Path, number: signal.Signals) -> None:
    (ran_project / "pack.sh").write_text(f"touch {ran_project}/started; setsid sleep 302 & sleep 302")
    commit(ran_project)
    command = [sys.executable, "-m", "flows.pipeline", "--set", "pack.max_length=256"]
    environment = {**child_environment(PYTHONPATH=str(ROOT)), "PREFECT_HOME": str(ran_project / "home")}
    # tests that run in a shell's background ignore the interrupt, and so would their children
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with (ran_project / "printed.log").open("wb") as log:
        flow = subprocess.Popen(command, cwd=ran_project, env=environment, stdout=log, stderr=log, preexec_fn=hearing)
    deadline = time.monotonic() + 120
    while not (ran_project / "started").exists():
        assert flow.poll() is None, (ran_project / "printed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tree = psutil.Process(flow.pid).children(recursive=True)
    assert [process for process in tree if "server" in process.cmdline()]
    assert len(list((ran_project / ".worktrees").iterdir())) == 2

    flow.send_signal(number)

    assert psutil.wait_procs(tree, timeout=15)[1] == []
    flow.wait(timeout=30)
    prune(ran_project)
    assert list((ran_project / ".worktrees").iterdir()) == []
    if number is not signal.SIGKILL:
        printed = (ran_project / "printed.log").read_text()
        assert flow.returncode == 130
        assert "error: interrupted" in printed
        assert "Traceback" not in printed


def deploy(name: str) -> Any:
    with get_client(sync_client=True) as client:
        return client.create_deployment(
            flow_id=client.create_flow(pipeline),
            name=name,
            parameter_openapi_schema=pipeline.parameters.model_dump_for_openapi(),
            enforce_parameter_schema=True,
        )


def test_cron_schedule_creates_runs(project: Path) -> None:
    deployment = deploy("nightly")
    with get_client(sync_client=True) as client:
        client.create_deployment_schedules(deployment, [(CronSchedule(cron="0 2 * * *", timezone="UTC"), True)])
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment})

        runs = [run for run in client.read_flow_runs() if run.deployment_id == deployment]

    assert runs
    assert {run.state_name for run in runs} == {"Scheduled"}
    assert {run.next_scheduled_start_time.hour for run in runs} == {2}


@pytest.mark.parametrize(
    "parameters",
    [{"overrides": {"train": {"learning_rate": "fast"}}}, {"overrides": {"train": {"learning_rat": 0.1}}}],
)
def test_server_refuses_a_wrong_value_before_a_run_exists(project: Path, parameters: dict[str, Any]) -> None:
    deployment = deploy("form")
    with get_client(sync_client=True) as client:
        with pytest.raises((PrefectHTTPStatusError, ObjectAlreadyExists)) as caught:
            client.create_flow_run_from_deployment(deployment, parameters=parameters)

        assert not [run for run in client.read_flow_runs() if run.deployment_id == deployment]
    assert "learning_rat" in str(caught.value.response.text)
