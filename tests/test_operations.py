"""Runs as an operator has them, for real, on a tiny model: swept, reproduced from their record, restored elsewhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.test_pipeline import ROOT, call, change_params, files_below, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RESULTS = ["--allow-empty", "-qm", "results"]


def commit(project: Path) -> None:
    call(project, "git", "add", "-A")
    call(project, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", *RESULTS)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout whose pipeline has run once, with its results committed and its params not."""
    folder = make_project(tmp_path_factory.mktemp("operations") / "project")
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    commit(folder)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SFT_LIVE_RUN", "on")
        call(folder, "dvc", "repro")
        commit(folder)
        yield folder


def runs(project: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("sft").experiment_id])


def test_run_of_the_pipeline_is_the_one_that_its_training_began(project: Path) -> None:
    (run,) = runs(project)
    assert (run.info.status, run.data.tags["sft.progress"]) == ("FINISHED", "published")
    # what only a training knows: its speed
    assert run.data.metrics["train/tokens_per_second"] > 0
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [2, 4, 6, 8, 10, 12]


def champion(project: Path) -> str:
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return str(client.get_model_version_by_alias("shop-extractor", "champion").run_id)


def test_best_trial_of_a_sweep_becomes_champion_without_a_second_run_for_its_result(project: Path) -> None:
    first = champion(project)

    printed = call(project, "python", "-m", "flows.sweep", "--param", "train.learning_rate=1e-3,1e-2", "--promote")

    assert "best of 2 trials: trial 2 with evaluate.tuned.loss" in printed
    # data was loaded, formatted and packed for the run that the checkout had
    assert len(re.findall(r"^\d .* 4 completed, 3 restored", printed, re.M)) == 2, printed
    parent = next(run for run in runs(project) if run.data.tags.get("sft.kind") == "sweep")
    children = {
        run.data.params["train.learning_rate"]: run
        for run in runs(project)
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert sorted(children) == ["0.001", "0.01"]
    assert champion(project) == children["0.01"].info.run_id != first
    assert all(run.data.metrics["train/tokens_per_second"] > 0 for run in children.values())
    assert all(
        run.data.tags["prefect.flow_run_id"] in run.data.tags["prefect.flow_run_url"] for run in children.values()
    )
    assert {run.info.status for run in runs(project)} == {"FINISHED"}
    assert len(runs(project)) == 4  # the first one, the sweep, its two trials
    assert call(project, "git", "status", "--porcelain") == ""


def test_run_is_reproduced_from_its_id_bit_for_bit(project: Path) -> None:
    run_id = champion(project)

    # the trial's params are a change to its commit
    printed = call(project, "python", "-m", "stages", "reproduce", run_id, "--trust-patch")

    assert "outs/train: the same, bit for bit\n" in printed
    assert "outs/quantize: the same, bit for bit\n" in printed
    assert "every figure is the same" in printed
    assert "reproduced: every result is the same, bit for bit" in printed
    assert "versions: the same" in printed
    assert call(project, "git", "worktree", "list").count("\n") == 1


def test_run_of_uncommitted_code_is_reproduced_with_its_patch(project: Path) -> None:
    code = project / "stages" / "training" / "setup.py"
    kept = code.read_text(encoding="utf-8")
    try:
        options = "**section.model_dump(exclude=NOT_SFT_OPTIONS)"
        assert kept.count(options) == 1
        changed = kept.replace(options, '**{**section.model_dump(exclude=NOT_SFT_OPTIONS), "adam_beta2": 0.9}')
        code.write_text(changed, encoding="utf-8")
        assert code.read_text(encoding="utf-8") != kept
        change_params(project, {"train": {"max_steps": 4}})
        call(project, "dvc", "repro")
    finally:
        call(project, "git", "checkout", "--", "stages", "params.yaml", "dvc.lock", "reports")
        call(project, "dvc", "checkout")
    patched = next(run for run in runs(project) if run.data.params.get("train.max_steps") == "4")
    assert patched.data.tags["git.dirty"] == "true"

    printed = call(project, "python", "-m", "stages", "reproduce", patched.info.run_id, "--trust-patch")

    assert "uncommitted changes: params.yaml, stages/training/setup.py (applied)" in printed
    assert "outs/train: the same, bit for bit" in printed
    assert "reproduced: every result is the same, bit for bit" in printed


def test_second_clone_restores_everything_from_the_remote_without_training(project: Path, tmp_path: Path) -> None:
    call(project, "dvc", "remote", "add", "--force", "--default", "store", str(tmp_path / "store"))
    call(project, "dvc", "push", "--run-cache")
    commit(project)
    clone = tmp_path / "clone"
    call(tmp_path, "git", "clone", "-q", str(project), str(clone))
    shutil.copytree(project / "base", clone / "base", dirs_exist_ok=True)

    call(clone, "dvc", "pull")

    assert files_below(clone / "outs") == files_below(project / "outs")
    for name in (*(f"outs/{name}" for name in files_below(project / "outs")), "reports/report.html"):
        assert (clone / name).read_bytes() == (project / name).read_bytes(), name
    assert call(clone, "dvc", "status").strip() == "Data and pipelines are up to date."
    assert "Running stage" not in call(clone, "dvc", "repro")
