from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from flows.runs.dvc_stage import Listener, Outcome, StageFailed, StageOutput, run_stage
from stages.progress import Report
from tests.flows.conftest import run


class Heard:
    """Stores the lines and progress that a listener gets."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: list[Report] = []
        self.listener = Listener(self.lines.append, self.progress.append)


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until_running(project: Path) -> None:
    deadline = time.monotonic() + 30
    while not (project / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_outcome_is_completed_or_unchanged_or_restored(project: Path) -> None:
    heard = Heard()

    first = run_stage(project, "load", heard.listener)
    second = run_stage(project, "load", heard.listener)
    (project / "outs" / "load.txt").unlink()
    third = run_stage(project, "load", heard.listener)

    assert [first, second, third] == [Outcome.COMPLETED, Outcome.UNCHANGED, Outcome.RESTORED]
    assert heard.lines == [
        "Running stage 'load':",
        "> mkdir -p outs reports/metrics && cat data/rows.txt > outs/load.txt",
        "Stage 'load' didn't change, skipping",
        "Stage 'load' is cached - skipping run, checking out outputs",
    ]


def test_force_runs_a_stage_whose_result_is_known(ran_project: Path) -> None:
    assert run_stage(ran_project, "load", Heard().listener, force=True) is Outcome.COMPLETED


def test_progress_lines_become_progress_and_the_last_state_of_a_bar_a_line(ran_project: Path) -> None:
    event = '{"stage": "pack", "done": 3, "total": 4, "part": "rows"}'
    script = rf"""printf ' 10%%\r 50%%\rdone\n'; echo 'PROGRESS {event}'; echo x > outs/pack.txt"""
    (ran_project / "pack.sh").write_text(script)
    heard = Heard()
    run_stage(ran_project, "pack", heard.listener)

    assert heard.progress == [Report("pack", 3, 4, "rows")]
    assert heard.lines[-1] == "done"


def test_a_stage_that_fails_leaves_what_it_had_written_before(ran_project: Path) -> None:
    files = [ran_project / "outs" / "train.txt", ran_project / "reports" / "metrics" / "train.json"]
    before = [file.read_bytes() for file in files]
    (ran_project / "train.sh").write_text("echo 'error: data/rows.txt:3: broken'; exit 1")

    with pytest.raises(StageFailed, match=r"data/rows\.txt:3"):
        run_stage(ran_project, "train", Heard().listener)

    assert [file.read_bytes() for file in files] == before


def test_stage_that_was_killed_may_be_tried_again(project: Path) -> None:
    dvc_yaml = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(dvc_yaml.replace("mkdir -p outs reports/metrics &&", "kill -KILL $$ &&"))

    with pytest.raises(StageFailed) as caught:
        run_stage(project, "load", Heard().listener)

    assert (str(caught.value), caught.value.killed) == ("load: ended by signal 9; out of memory?", True)


@pytest.mark.parametrize(
    ("lines", "exit_code", "message", "killed"),
    [
        (["error: params.yaml: 2 problems", "  a", "  b"], 2, "load: params.yaml: 2 problems\n  a\n  b", False),
        (["Traceback (most recent call last):", "KeyError: 5"], 1, "load: exit code 1: KeyError: 5", False),
        ([], 3, "load: exit code 3: it printed nothing", False),
        ([], 137, "load: ended by signal 9; out of memory?", True),
        (["error: process 1 of 2 was ended by signal 9"], 137, "load: process 1 of 2 was ended by signal 9", True),
        ([], -15, "load: ended by signal 15", True),
        ([], -11, "load: ended by signal 11", False),
        ([], 75, "load: SIGTERM stopped it after it saved a checkpoint; run it again to go on", True),
    ],
)
def test_reason_of_a_failure_is_taken_from_who_knows_best(
    lines: list[str], exit_code: int, message: str, killed: bool
) -> None:
    output = StageOutput(Heard().listener)
    for line in [*lines, f"ERROR: failed to reproduce 'load': failed to run: x, exited with {exit_code}"]:
        output.feed(line)

    failure = output.failure("load", dvc_code=255)

    assert (str(failure), failure.killed) == (message, killed)


def test_missing_input_is_reported_with_the_message_of_dvc(project: Path) -> None:
    with pytest.raises(StageFailed, match=r"pack: failed to reproduce 'pack': .*outs/load\.txt"):
        run_stage(project, "pack", Heard().listener)


def test_edit_during_the_run_is_not_recorded(ran_project: Path) -> None:
    script = "sed -i 's/max_length: 512/max_length: 256/' params.yaml; echo old > outs/pack.txt"
    (ran_project / "pack.sh").write_text(script)

    with pytest.raises(StageFailed, match="pack: pack changed while it ran, so nothing was recorded; run it again"):
        run_stage(ran_project, "pack", Heard().listener)

    assert sorted(YAML().load(ran_project / "dvc.lock")["stages"]) == ["load", "train"]
    # the state that was edited into being is not served from the cache either
    assert run_stage(ran_project, "pack", Heard().listener) is Outcome.COMPLETED


def test_exception_while_waiting_ends_the_process_tree(ran_project: Path) -> None:
    (ran_project / "pack.sh").write_text("setsid sleep 300 & touch started; echo go; sleep 300")
    before = descendants()
    started = time.monotonic()

    with pytest.raises(KeyboardInterrupt):
        run_stage(ran_project, "pack", Listener(Stopper(KeyboardInterrupt).hear, Heard().progress.append))

    assert descendants() == before
    assert time.monotonic() - started < 5


class Stopper:
    """Raises an error once the stage prints `go`, as a cancellation would at any moment."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def hear(self, line: str) -> None:
        if line == "go":
            raise self._error


def test_tree_ends_with_a_flow_that_is_killed(ran_project: Path) -> None:
    (ran_project / "pack.sh").write_text("setsid sleep 301 & touch started; sleep 301")
    code = (
        "from pathlib import Path; from flows.runs.dvc_stage import *\n"
        "run_stage(Path.cwd(), 'pack', Listener(print, print))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=ran_project, env=environment, stdout=subprocess.DEVNULL)
    wait_until_running(ran_project)
    tree = psutil.Process(flow.pid).children(recursive=True)
    assert len(tree) >= 4

    flow.send_signal(signal.SIGKILL)
    flow.wait()

    assert psutil.wait_procs(tree, timeout=5)[1] == []


def test_second_run_in_the_same_checkout_gets_the_message_of_the_lock(ran_project: Path) -> None:
    (ran_project / "pack.sh").write_text("touch started; until test -e go; do sleep 0.1; done; echo x > outs/pack.txt")
    first = threading.Thread(target=run, args=(ran_project, sys.executable, "-m", "dvc", "repro", "-s", "pack"))
    first.start()
    wait_until_running(ran_project)

    with pytest.raises(StageFailed, match="is busy, it is being blocked by"):
        run_stage(ran_project, "pack", Heard().listener)
    (ran_project / "go").touch()
    first.join()
