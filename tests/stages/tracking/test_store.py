"""Tracking store: values of any length are whole, and runs of processes that were killed don't run for ever."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.tools.compare import report
from stages.tracking.lineage import PARENT_TAG
from stages.tracking.recorded import recorded_run
from stages.tracking.store import (
    KIND_TAG,
    PROCESS_TAG,
    PROGRESS_TAG,
    SWEEP,
    TRAINED,
    Tracking,
    open_tracking,
    whole_value,
)
from stages.tracking.trials import recorded_sweep
from tests.stages.tiny_run import REPO, tiny_params

SWEEPING = """
import sys, time
from pathlib import Path
from stages.tracking.trials import recorded_sweep
with recorded_sweep(Path(sys.argv[1]), "killed", {}) as record:
    print(record.parent.run_id, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    root = tmp_path_factory.mktemp("store")
    (root / "params.yaml").write_text(json.dumps(tiny_params().model_dump()), encoding="utf-8")
    return open_tracking(tiny_params().publish, root)


CREATING = """
import sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from stages.tracking.store import create_database

tables = 0

@event.listens_for(Engine, "before_cursor_execute")
def stop(connection, cursor, statement, *rest):
    global tables
    tables += statement.lstrip().startswith("CREATE TABLE")
    if tables == int(sys.argv[2]):
        print("creating", flush=True)
        sys.stdin.read()

create_database(sys.argv[1])
"""


def test_a_kill_while_the_store_is_created_leaves_one_that_can_be_created(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CREATING, f"sqlite:///{tmp_path}/mlflow.db", "12"],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "creating\n"
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    opened = open_tracking(tiny_params().publish, tmp_path)
    with opened.whole_run("after", {}) as writer:
        writer.log_params({"train.seed": 0})
    assert opened.client.get_run(writer.run_id).data.params == {"train.seed": "0"}
    assert not list(tmp_path.glob("mlflow.db.new*"))


def root_of(tracking: Tracking) -> Path:
    return Path(tracking.uri.removeprefix("sqlite:///")).parent


def test_values_longer_than_mlflow_allows_are_whole_and_compared_whole(tracking: Tracking) -> None:
    rows = [{"path": f"data/part-{number:04}.jsonl", "weight": 1.0} for number in range(200)]
    changed = [*rows[:-1], {"path": "data/other.jsonl", "weight": 1.0}]
    found = []
    for name, sources in (("one", rows), ("two", changed), ("three", rows)):
        with tracking.whole_run(name, {"note": "n" * 8001, "dvc.data/a (1).jsonl": "5e"}) as writer:
            writer.log_params({"load.sources": sources, "train.seed": 0})
        found.append(tracking.client.get_run(writer.run_id))
    one, two, three = found
    text, digest = json.dumps(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert len(text) > 6000
    short = f"sha256:{digest} ({len(text)} characters, in artifact long_values/{digest}.txt)"
    assert one.data.params == {"load.sources": short, "train.seed": "0"}
    assert whole_value(tracking.client, one.info.run_id, short) == text
    assert whole_value(tracking.client, one.info.run_id, "0") == "0"
    assert whole_value(tracking.client, one.info.run_id, one.data.tags["note"]) == "n" * 8001
    assert one.data.tags["dvc.data/a _1_.jsonl"] == "5e"
    lines = report(recorded_run(one), recorded_run(two), tracking.client)
    before, after = (
        '....0}, {"path": "data/part-0199.jsonl", "weight": 1.0}]',
        '....0}, {"path": "data/other.jsonl", "weight": 1.0}]',
    )
    assert f"  load.sources: {before} -> {after}" in lines
    assert "params: no differences" in report(recorded_run(one), recorded_run(three), tracking.client)


def test_long_names_of_data_are_told_apart(tracking: Tracking) -> None:
    names = [f"https://host/{'x' * 600}/{end}" for end in ("a", "b")]
    with tracking.whole_run("data", {}) as writer:
        writer.log_data(dict.fromkeys(names, "5e" * 32))
    run = tracking.client.get_run(writer.run_id)
    assert sorted(json.loads(item.dataset.source)["path"] for item in run.inputs.dataset_inputs) == names


def statuses(tracking: Tracking, *run_ids: str) -> list[str]:
    return [tracking.client.get_run(run_id).info.status for run_id in run_ids]


def begin(tracking: Tracking, tags: dict[str, str]) -> str:
    return str(tracking.client.create_run(tracking.experiment_id, tags=tags).info.run_id)


def test_sweep_that_was_killed_leaves_no_run_running_after_the_next_start(tracking: Tracking) -> None:
    root = root_of(tracking)
    process = subprocess.Popen([sys.executable, "-c", SWEEPING, str(root)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    sweep = process.stdout.readline().strip()
    host = tracking.client.get_run(sweep).data.tags[PROCESS_TAG].rsplit(" ", 2)[0]
    gone = {PROCESS_TAG: f"{host} {process.pid} 0"}
    training = begin(tracking, {PARENT_TAG: sweep, PROGRESS_TAG: "training", **gone})
    trained = begin(tracking, {PARENT_TAG: sweep, PROGRESS_TAG: TRAINED, **gone})
    waiting = begin(tracking, {PROGRESS_TAG: TRAINED, **gone})
    elsewhere = begin(tracking, {PROGRESS_TAG: "training", PROCESS_TAG: "another-host 1 0"})
    tracking.end_interrupted()
    # the sweep is at work: what it trained waits for it
    assert statuses(tracking, sweep, training, trained) == ["RUNNING", "KILLED", "RUNNING"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert statuses(tracking, sweep) == ["RUNNING"]

    with recorded_sweep(root, "next", {}) as record:
        assert statuses(tracking, sweep, training, trained, record.parent.run_id) == ["KILLED"] * 3 + ["RUNNING"]
        assert statuses(tracking, waiting, elsewhere) == ["RUNNING", "RUNNING"]
    assert tracking.client.get_run(record.parent.run_id).data.tags[KIND_TAG] == SWEEP


def test_first_of_two_runs_of_one_result_is_the_one_that_ended_first(tracking: Tracking) -> None:
    early, late = (begin(tracking, {"sft.result_digest": "twice"}) for _ in range(2))
    tracking.client.set_terminated(late, end_time=1000)
    tracking.client.set_terminated(early, end_time=int(time.time() * 1000))
    assert tracking.find_run("sft.result_digest", "twice") == late


def test_request_that_the_store_refuses_is_one_message_with_the_address(tracking: Tracking) -> None:
    message = r"publish\.tracking_uri 'sqlite:.*mlflow\.db': .*nothing.*typed again"
    with pytest.raises(ValueError, match=message), tracking.locked():
        tracking.client.get_run("nothing")
