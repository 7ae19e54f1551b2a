"""An operator's bad day: everything that runs is killed at random moments, runs are cancelled, and nothing is lost."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.flows.test_ui import fetch, free_port
from tests.test_operations import commit
from tests.test_pipeline import ROOT, call, change_params, environment, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
NUM_KILLS = 20
VICTIMS = {
    "stage": ("-m", "stages"),
    "dvc": ("-m", "dvc", "repro"),
    "flow": ("-m", "dvc", "repro"),  # two steps above it: between them stands the guard
    "worker": ("-m", "flows.processes.worker"),
}
RESULTS = (
    "outs/train/model/adapter_model.safetensors",
    "outs/train/curve.csv",
    "outs/merge/model/model.safetensors",
    "outs/quantize/model/model.safetensors",
    "outs/evaluate/generations.jsonl",
    *(f"reports/metrics/{stage}.json" for stage in ("load", "pack", "train", "merge", "quantize", "evaluate")),
)


@dataclass
class Operator:
    """Someone with `make ui`, who starts it again when it has gone, and starts runs."""

    project: Path
    port: int
    ui: subprocess.Popen[str] | None = None
    form: str = ""
    mlflow: str = ""

    def open_pages(self) -> None:
        """Start the servers unless they are there."""
        if self.ui is not None and self.ui.poll() is None:
            return
        command = [sys.executable, "-m", "flows.ui", "--prefect-port", str(self.port)]
        variables = {name: value for name, value in environment().items() if name != "PREFECT_HOME"}
        self.ui = subprocess.Popen(
            [*command, "--mlflow-port", str(free_port())],
            cwd=self.project,
            env={**variables, "SFT_LIVE_RUN": "on"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ui.stdout is not None
        printed = []
        while "Ctrl-C" not in (line := self.ui.stdout.readline()):
            printed.append(line)
            assert self.ui.poll() is None, printed
        self.form, self.mlflow = re.findall(r"(?:start a run: |MLflow +)(http\S+)", "".join(printed))

    def close_pages(self) -> None:
        if self.ui is not None and self.ui.poll() is None:
            self.ui.send_signal(signal.SIGTERM)
            self.ui.wait(timeout=90)

    def start(self, **parameters: Any) -> str:
        deployment = fetch(self.project, "/deployments/name/pipeline/pipeline")
        path = f"/deployments/{deployment['id']}/create_flow_run"
        return str(fetch(self.project, path, {"parameters": parameters})["id"])

    def runs(self) -> list[str]:
        return [run["id"] for run in fetch(self.project, "/flow_runs/filter", {"flow_runs": {}})]

    def state(self, run_id: str) -> dict[str, Any]:
        return dict(fetch(self.project, f"/flow_runs/{run_id}")["state"])

    def printed(self, run_id: str) -> str:
        wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(entry["message"] for entry in fetch(self.project, "/logs/filter", wanted))

    def find(self, kind: str) -> psutil.Process | None:
        """A living process of one kind below the servers."""
        if self.ui is None or self.ui.poll() is not None:
            return None
        for process in psutil.Process(self.ui.pid).children(recursive=True):
            with suppress(psutil.Error):  # gone meanwhile
                line = process.cmdline()
                guard = any("supervise.py" in part for part in line)
                if not guard and all(word in line for word in VICTIMS[kind]):
                    return process.parents()[1] if kind == "flow" else process
        return None


def wait_until(found: Callable[[], Any], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which nothing has run yet."""
    project = make_project(tmp_path_factory.mktemp("kills") / "project")
    change_params(project, {"train": {"max_steps": 60, "save_steps": 1, "eval_steps": 20}})
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "prefect.yaml", project / "prefect.yaml")
    commit(project)
    return project


@pytest.fixture
def operator(untouched: Path, tmp_path: Path) -> Iterator[Operator]:
    project = shutil.copytree(untouched, tmp_path / "project", symlinks=True)
    operator = Operator(project, free_port())
    yield operator
    operator.close_pages()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ends process trees by Linux' means")
def test_twenty_kills_lose_and_change_nothing(operator: Operator, untouched: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(untouched, tmp_path / "whole", symlinks=True)
    call(whole, "dvc", "repro")

    killed = kill_at_random(operator, random.Random(3))
    last = finish(operator)

    assert operator.state(last)["type"] == "COMPLETED"
    assert set(killed) == set(VICTIMS), killed
    assert len(killed) == NUM_KILLS
    for name in RESULTS:
        assert (operator.project / name).read_bytes() == (whole / name).read_bytes(), name
    assert call(operator.project, "dvc", "status").strip() == "Data and pipelines are up to date."
    client = MlflowClient(f"sqlite:///{operator.project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("sft").experiment_id])
    assert [(run.info.status, run.data.tags["sft.progress"]) for run in runs] == [("FINISHED", "published")]


def kill_at_random(operator: Operator, moments: random.Random) -> list[str]:
    """Kill twenty processes, each while a stage is at work; starts runs and servers as often as needed."""
    killed: list[str] = []
    run_id = ""
    while len(killed) < NUM_KILLS:
        operator.open_pages()
        if not run_id or operator.state(run_id)["type"] in ("COMPLETED", "FAILED", "CRASHED"):
            # a whole pipeline would have nothing left to be killed
            run_id = operator.start(force=bool(run_id) and operator.state(run_id)["type"] == "COMPLETED")
        if not wait_for_work(operator, run_id):
            continue
        time.sleep(moments.uniform(0, 15))
        kind = moments.choices(list(VICTIMS), weights=[9, 4, 5, 2])[0]
        victim = operator.find(kind)
        if victim is not None:
            print(f"{time.strftime('%X')} killing {kind}: {' '.join(victim.cmdline())[-60:]}", flush=True)
            victim.kill()
            killed.append(kind)
            time.sleep(0.5)
            if kind == "worker":
                assert operator.ui is not None
                assert operator.ui.wait(timeout=90) == 1  # it says so, and takes everything with it
    return killed


def wait_for_work(operator: Operator, run_id: str) -> bool:
    """Wait until a stage runs; False when the run has ended, or the servers have."""
    deadline = time.monotonic() + 300
    while operator.find("stage") is None:
        assert time.monotonic() < deadline, f"run {run_id} does nothing: {operator.state(run_id)}"
        if operator.ui is None or operator.ui.poll() is not None:
            return False
        if operator.state(run_id)["type"] in ("COMPLETED", "FAILED", "CRASHED"):
            return False
        time.sleep(0.1)
    return True


def finish(operator: Operator) -> str:
    """Let it run to its end."""
    operator.open_pages()
    run_id = operator.start()
    wait_until(lambda: operator.state(run_id)["type"] in ("COMPLETED", "FAILED", "CRASHED"), 600)
    return run_id


def test_cancelled_run_ends_within_five_seconds_and_the_next_one_resumes_training(operator: Operator) -> None:
    change_params(operator.project, {"train": {"max_steps": 300}})
    operator.open_pages()
    first = operator.start(to_stage="train")
    checkpoints = operator.project / ".state" / "train"
    wait_until(lambda: list(checkpoints.glob("*/checkpoint-*/seal.json")), 300)
    flow = operator.find("flow")
    assert flow is not None
    tree = [flow, *flow.children(recursive=True)]
    assert len(tree) >= 4

    started = time.monotonic()
    fetch(operator.project, f"/flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: not any(process.is_running() for process in tree), 30)

    # the worker asks every second or two who is to be cancelled
    assert time.monotonic() - started < 5
    wait_until(lambda: operator.state(first)["type"] == "CANCELLED", 60)
    assert "Crash" not in operator.printed(first)
    second = operator.start(to_stage="train")
    wait_until(lambda: operator.state(second)["type"] in ("COMPLETED", "FAILED", "CRASHED"), 400)
    assert operator.state(second)["type"] == "COMPLETED"
    assert re.search(r"resuming from checkpoint-\d+", operator.printed(second))
    assert json.loads((operator.project / "reports" / "metrics" / "train.json").read_text())["steps"] == 300
