"""A training's run in MLflow: grows during training, is resumed after a kill, and never delays the training."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.params.schema import load_params
from stages.tracking import lineage
from stages.tracking.live_run import LiveRun
from stages.tracking.store import PROGRESS_TAG, TRAINING_TAG, Tracking, open_tracking
from stages.training.checkpoints import TrainingState
from stages.training.curve import live_run
from tests.stages.training_root import REPO, make_training_root, run_stage, start_stage

ON = {"SFT_LIVE_RUN": "on"}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, which takes MLflow several seconds."""
    folder = tmp_path_factory.mktemp("live")
    open_tracking(load_params(REPO / "params.yaml").publish, folder)
    return folder / "mlflow.db"


@pytest.fixture
def tracking(empty_store: Path, tmp_path: Path) -> Tracking:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return open_tracking(load_params(REPO / "params.yaml").publish, tmp_path)


def all_runs(root: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sft")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def curve(root: Path, name: str) -> list[tuple[int, float]]:
    (run,) = all_runs(root)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, f"train/{name}")]


def machine_points(root: Path) -> int:
    """How many points the curve of the processor's load has; where it has any, memory in use has some as well."""
    (run,) = all_runs(root)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    history = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert not history or run.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert len({point.step for point in history}) == len(history)
    return len(history)


def live(tracking: Tracking, folder: Path) -> LiveRun:
    return LiveRun(lambda: tracking, folder, "tiny-unfinished", {"train.seed": 0}, {"git.commit": "abc"})


def wait_for_points(root: Path, number: int, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: bool(all_runs(root)) and len(curve(root, "loss")) >= number, process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_curve_grows_while_it_trains_and_goes_on_after_a_kill(tmp_path: Path, empty_store: Path) -> None:
    paths = make_training_root(tmp_path / "root", max_steps=400, save_steps=2, eval_steps=8)
    shutil.copy(empty_store, paths.root / "mlflow.db")
    load = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.5"}
    process = start_stage(paths, **ON, **load)
    wait_for_points(paths.root, 3, process)
    first = len(curve(paths.root, "loss"))
    wait_for_points(paths.root, first + 3, process)
    wait_until(lambda: machine_points(paths.root) > 0, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = all_runs(paths.root)
    assert (run.info.status, run.data.tags[PROGRESS_TAG]) == ("RUNNING", "training")
    assert run.info.run_name == "base-unfinished"
    assert run.data.params["train.learning_rate"] == "0.01"
    reached = curve(paths.root, "loss")[-1][0]

    loads = machine_points(paths.root)
    output = run_stage(paths, **ON, **load)

    assert "resuming from checkpoint-" in output
    assert machine_points(paths.root) > loads > 0  # the second attempt continues them, too
    assert "warning" not in output
    steps = [step for step, _ in curve(paths.root, "loss")]
    assert steps == list(range(1, 401))
    assert reached < 400
    assert {"train/grad_norm", "train/learning_rate", "eval/loss", "train/tokens_per_second"} <= set(
        all_runs(paths.root)[0].data.metrics
    )
    assert all_runs(paths.root)[0].info.run_id == run.info.run_id
    assert all_runs(paths.root)[0].data.tags[TRAINING_TAG] == lineage.training_digest(
        load_params(paths.root / "params.yaml"), paths
    )
    lines = paths.out("train", "curve.csv").read_text().splitlines()[1:]
    assert curve(paths.root, "loss") == [(int(line.split(",")[0]), float(line.split(",")[1])) for line in lines]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db"])
def test_store_that_can_not_be_reached_costs_one_warning_and_nothing_else(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section = load_params(REPO / "params.yaml").publish.model_copy(update={"tracking_uri": uri})
    run = LiveRun(lambda: open_tracking(section, tmp_path), tmp_path, "tiny", {}, {})
    started = time.monotonic()
    for step in range(3):
        run.log({"loss": 1.0}, step, 0)
    assert time.monotonic() - started < 0.5
    run.trained("digest")
    assert time.monotonic() - started < 12
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning: ")] == said
    assert len(said) == 1
    assert "`publish` records it" in said[0]


def test_points_and_tags_of_a_store_that_was_away_for_a_while_are_sent_later(
    tracking: Tracking, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.tracking.live_run.RETRY_S", 0.1)
    away = iter([True, True, False])
    run = LiveRun(lambda: _unless(next(away), tracking), tmp_path, "tiny", {}, {})
    for step in range(1, 4):
        run.log({"loss": 1.0 / step}, step, 0)
        time.sleep(0.3)
    run.trained("digest")
    assert [step for step, _ in curve(tmp_path, "loss")] == [1, 2, 3]
    assert all_runs(tmp_path)[0].data.tags[TRAINING_TAG] == "digest"
    assert capsys.readouterr().err.count("warning: ") == 1


def _unless(away: bool, tracking: Tracking) -> Tracking:
    if away:
        raise ConnectionError("connection refused")
    return tracking


def test_resumed_training_adds_to_its_run_what_the_run_lacks(tracking: Tracking, tmp_path: Path) -> None:
    first = live(tracking, tmp_path)
    for step in (1, 2, 3):
        first.log({"loss": float(step)}, step, 0)
    first.ended("FAILED")
    (run,) = all_runs(tmp_path)
    assert run.info.status == "FAILED"

    second = live(tracking, tmp_path)  # from the checkpoint at step 2
    for step in (1, 2, 3, 4):
        second.log({"loss": float(step)}, step, 0)
    second.trained("digest")

    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    (again,) = all_runs(tmp_path)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "RUNNING"


def test_run_that_has_been_published_is_not_touched_again(tracking: Tracking, tmp_path: Path) -> None:
    live(tracking, tmp_path).trained("digest")
    (run,) = all_runs(tmp_path)
    key = read_json(tmp_path / "live_run.json")["key"]
    with tracking.whole_run("whole", {PROGRESS_TAG: "published"}, begun=run.info.run_id):
        pass
    live(tracking, tmp_path).trained("digest")
    assert len(all_runs(tmp_path)) == 2
    assert tracking.client.get_run(run.info.run_id).data.tags[PROGRESS_TAG] == "published"
    assert read_json(tmp_path / "live_run.json")["key"] != key


def test_switch_with_another_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, paths = load_params(REPO / "params.yaml"), Paths(tmp_path)
    monkeypatch.setenv("SFT_LIVE_RUN", "of")
    with (
        pytest.raises(ValueError, match="SFT_LIVE_RUN='of': it must be `on` or `off`"),
        live_run(params, paths, TrainingState(tmp_path), first_process=True),
    ):
        pass
