from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from flows.cleaning.cache import clean_cache, recorded_hashes
from flows.cleaning.leftovers import DAY_S, find_leftovers
from flows.cleanup import cleanup, main
from flows.runs.graph import RunRefused, read_plan
from flows.runs.isolated_checkout import isolated_checkout
from stages.checkout.artifacts import write_json
from stages.launch.lock import FOLDER_VARIABLE, sole_training
from stages.params.schema import load_params
from stages.tracking.lineage import dvc_hashes
from stages.tracking.live_run import KEY_FILE, KEY_TAG
from stages.tracking.result import log_text
from stages.tracking.store import HASHES, HASHES_TAG, PROGRESS_TAG, Tracking, open_tracking
from tests.flows.conftest import replace_param, run


def repro(project: Path) -> None:
    run(project, "dvc", "repro", "--quiet")


def cached(project: Path) -> set[str]:
    return {path.parent.name + path.name for path in (project / ".dvc" / "cache" / "files" / "md5").glob("*/*")}


def trained(project: Path, rate: str) -> str:
    """Run the pipeline with a rate; returns the hash of what came out."""
    replace_param(project, "learning_rate: 0.001", f"learning_rate: {rate}")
    repro(project)
    replace_param(project, f"learning_rate: {rate}", "learning_rate: 0.001")
    return dvc_hashes(project)["outs/train.txt"]


def record(project: Path) -> None:
    """A run in MLflow as `publish` writes it: with DVC's hashes of everything as an artifact."""
    tracking = open_tracking(load_params(project / "params.yaml").publish, project)
    with tracking.whole_run("recorded", {HASHES_TAG: HASHES}) as run:
        log_text(run, Path(HASHES).name, json.dumps(dvc_hashes(project)))


def test_recorded_hashes_are_those_of_artifacts_and_of_older_tags(ran_project: Path) -> None:
    record(ran_project)
    tracking = open_tracking(load_params(ran_project / "params.yaml").publish, ran_project)
    with tracking.whole_run("of an earlier version", {"dvc.outs/train.txt": "5e" * 16}):
        pass
    assert {dvc_hashes(ran_project)["outs/train.txt"], "5e" * 16} <= recorded_hashes(ran_project)


def test_a_run_whose_hashes_can_not_be_read_stops_the_cleaning(ran_project: Path) -> None:
    tracking = open_tracking(load_params(ran_project / "params.yaml").publish, ran_project)
    with tracking.whole_run("recorded", {HASHES_TAG: HASHES}) as run:
        pass
    with pytest.raises(RunRefused, match=f"run {run.run_id} in MLflow: its artifact {HASHES} can't be read"):
        recorded_hashes(ran_project)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.slow
def test_cache_keeps_what_checkout_commits_and_recorded_runs_refer_to(
    ran_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = dvc_hashes(ran_project)["outs/train.txt"]
    in_mlflow = trained(ran_project, "0.002")
    record(ran_project)
    forgotten = trained(ran_project, "0.003")
    in_checkout = trained(ran_project, "0.004")
    everything = {committed, in_mlflow, forgotten, in_checkout}
    assert len(everything) == 4
    assert everything <= cached(ran_project)

    looked = cleanup(return_state=True)

    assert everything <= cached(ran_project)
    assert "can be removed; nothing was removed, use `--remove`" in str(looked.message)
    assert "DVC's cache: 1 files that no commit and no recorded run refers to" in capsys.readouterr().out

    assert cleanup(remove=True, return_state=True).is_completed()
    assert everything & cached(ran_project) == everything - {forgotten}
    assert cleanup(return_state=True).message == "nothing to clean up"


def test_folders_of_recorded_runs_keep_the_files_inside(ran_project: Path) -> None:
    (ran_project / "pack.sh").write_text("mkdir outs/pack.txt; echo $RANDOM$RANDOM > outs/pack.txt/rows")
    (ran_project / "train.sh").write_text("cp -r outs/pack.txt outs/train.txt; echo '{}' > reports/metrics/train.json")
    repro(ran_project)
    inside = (ran_project / "outs" / "pack.txt" / "rows").read_bytes()
    record(ran_project)
    run(ran_project, "git", "checkout", "--quiet", "--", ".")
    run(ran_project, "dvc", "checkout", "--quiet", "--force")

    clean_cache(ran_project, dry=False)
    assert any(path.read_bytes() == inside for path in (ran_project / ".dvc" / "cache" / "files" / "md5").glob("*/*"))


def test_cache_is_left_alone_while_a_run_is_at_work(ran_project: Path) -> None:
    text = (ran_project / "params.yaml").read_text()
    with (
        isolated_checkout(ran_project, "run-1", text, read_plan(ran_project), given=[]),
        pytest.raises(RunRefused, match="the cache is in use by run-1"),
    ):
        clean_cache(ran_project, dry=False)


def test_leftovers_are_found_and_needed_files_are_not(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, logs = project / ".state" / "train", project / ".state" / "logs"
    ages = {"finished": 0.1, "just_finished": 0.0, "forgotten": 15.0, "resumable": 13.0}
    for name, days in ages.items():
        (train / name).mkdir(parents=True)
        if "finished" in name:
            (train / name / "finished").touch()
        else:
            (train / name / "checkpoint").write_bytes(b"x" * 1000)
        age(train / name, days)
    logs.mkdir()
    for name, days in {"old.log": 15.0, "new.log": 0.0}.items():
        (logs / name).touch()
        age(logs / name, days)
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", ".worktrees/dead"], cwd=project, check=True)
    (project / ".worktrees" / "dead.lock").touch()

    found = {leftover.path.name: leftover.num_bytes for leftover in find_leftovers(project, keep_days=14)}

    assert sorted(found) == ["dead", "finished", "forgotten", "old.log"]
    assert found["forgotten"] == 1000
    shutil.rmtree(train / "just_finished")


def age(path: Path, days: float) -> None:
    """Make a file, or a folder and all in it, look as if it had been written so many days ago."""
    for each in [*path.rglob("*"), path]:
        os.utime(each, (time.time() - days * DAY_S,) * 2)


@pytest.mark.usefixtures("prefect_server")
def test_from_the_terminal_nothing_goes_without_remove(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project / ".state" / "train" / "forgotten"
    folder.mkdir(parents=True)
    age(folder, 20)

    assert main(["--no-cache"]) == 0
    assert folder.exists()
    assert "checkpoints that were not resumed for 20 days" in capsys.readouterr().out
    assert main(["--no-cache", "--remove"]) == 0
    assert not folder.exists()


@pytest.fixture
def begun(project: Path) -> Tracking:
    """Three trainings that have begun a run: one not resumed for long, one that failed, one that may be resumed."""
    tracking = open_tracking(load_params(project / "params.yaml").publish, project)
    for name, days in {"forgotten": 20.0, "failed": 20.0, "resumable": 1.0}.items():
        folder = project / ".state" / "train" / name
        write_json(folder / KEY_FILE, {"key": name})
        age(folder, days)
        run_id = tracking.client.create_run(
            tracking.experiment_id, run_name=f"{name}-unfinished", tags={KEY_TAG: name, PROGRESS_TAG: "training"}
        ).info.run_id
        if name == "failed":
            tracking.client.set_terminated(run_id, "FAILED")
    return tracking


def fates(tracking: Tracking) -> dict[str, tuple[str, str]]:
    found = tracking.client.search_runs([tracking.experiment_id])
    return {run.info.run_name: (run.info.status, run.data.tags[PROGRESS_TAG]) for run in found}


@pytest.mark.usefixtures("prefect_server")
def test_run_whose_training_loses_its_checkpoints_ends(
    project: Path, begun: Tracking, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fates(begun)

    assert main(["--no-cache"]) == 0

    assert "run forgotten-unfinished in MLflow: ends as KILLED with its checkpoints" in capsys.readouterr().out
    assert fates(begun) == before
    assert main(["--no-cache", "--remove"]) == 0
    why = "given up, its checkpoints were removed: checkpoints that were not resumed for 20 days"
    assert fates(begun) == {**before, "forgotten-unfinished": ("KILLED", why)}
    assert [folder.name for folder in (project / ".state" / "train").iterdir()] == ["resumable"]


def test_checkpoints_stay_while_a_training_is_at_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(project / "locks"))
    folder = project / ".state" / "train" / "forgotten"
    folder.mkdir(parents=True)
    age(folder, 20)
    with sole_training(project / ".worktrees" / "trial"):
        assert find_leftovers(project, keep_days=0) == []
    with sole_training(project.with_name("elsewhere")):
        assert [one.path for one in find_leftovers(project, keep_days=0)] == [folder]
