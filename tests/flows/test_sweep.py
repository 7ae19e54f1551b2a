from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlflow import MlflowClient

from flows.sweep import main, sweep
from stages.params.schema import load_params
from tests.flows.conftest import commit, run
from tests.flows.test_pipeline import all_artifacts, artifacts

pytestmark = pytest.mark.usefixtures("prefect_server")

# The best rate is 0.003; 0.5 is refused by the stage itself. What ran is counted where worktrees don't take it along.
TRAIN_SH = """\
mkdir -p reports/metrics
echo train >> $SFT_STATE_DIR/ran.log
rate=$(sed -n 's/^  learning_rate: *\\([^ ]*\\).*/\\1/p' params.yaml)
test $rate != 0.5 || { echo "error: training ended with loss nan; lower train.learning_rate" >&2; exit 1; }
python3 -c "import json; print(json.dumps({'loss': 1 + abs($rate - 0.003), 'steps': 5}))" > reports/metrics/train.json
cp outs/pack.txt outs/train.txt
"""
PACK_SH = "echo pack >> $SFT_STATE_DIR/ran.log; cp outs/load.txt outs/pack.txt\n"


@pytest.fixture
def measured(project: Path) -> Path:
    """The small project, with a loss that hangs on the rate."""
    (project / "train.sh").write_text(TRAIN_SH)
    (project / "pack.sh").write_text(PACK_SH)
    (project / ".gitignore").write_text((project / ".gitignore").read_text() + "mlflow.db*\nmlartifacts/\nbest.yaml\n")
    (project / ".state").mkdir()
    commit(project)
    return project


def test_grid_is_ranked_recorded_and_what_trials_share_runs_once(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = sweep(
        ["train.learning_rate=0.001,0.5,0.004", "train.seed=0,1"],
        objective="train.loss",
        write_to="best.yaml",
        return_state=True,
    )

    assert state.message == (
        "best of 6 trials (2 failed): trial 5 with train.loss 1.001: train.learning_rate=0.004, train.seed=0"
    )
    assert (measured / ".state" / "ran.log").read_text().split() == ["pack", *["train"] * 6]
    table = json.loads(artifacts(state)["sweep-leaderboard"].data)
    assert [(row["trial"], row["train.learning_rate"], row["objective"]) for row in table] == [
        ("5", "0.004", "1.001"),
        ("6", "0.004", "1.001"),
        ("1", "0.001", "1.002"),
        ("2", "0.001", "1.002"),
        ("3", "0.5", ""),
        ("4", "0.5", ""),
    ]
    # it grows with the trials, for whoever looks meanwhile
    grown = [len(json.loads(board.data)) for board in all_artifacts(state) if board.key == "sweep-leaderboard"]
    assert grown == [1, 2, 3, 4, 5, 6]
    assert table[-1]["problem"] == "train: training ended with loss nan; lower train.learning_rate"
    printed = capsys.readouterr().out
    assert "python -m flows.pipeline --set 'train.learning_rate=0.004' --set 'train.seed=0'" in printed

    best = load_params(measured / "best.yaml")
    assert (best.train.learning_rate, best.train.seed) == (0.004, 0)
    assert "# Peak learning rate." in (measured / "best.yaml").read_text()
    assert run(measured, "git", "status", "--porcelain") == ""
    assert list((measured / ".worktrees").iterdir()) == []
    check_records(measured)


def check_records(project: Path) -> None:
    """One parent, a child for each of the four trials that ended well."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("sft").experiment_id])
    (parent,) = [found for found in runs if found.data.tags.get("sft.kind") == "sweep"]
    children = [found for found in runs if found.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert (len(runs), len(children), parent.info.status) == (5, 4, "FINISHED")
    assert {(found.data.params["train.learning_rate"], found.data.metrics["train.loss"]) for found in children} == {
        ("0.001", 1.002),
        ("0.004", 1.001),
    }
    assert parent.data.params["best.train.learning_rate"] == "0.004"
    assert parent.data.metrics["best.objective"] == 1.001


def test_figure_that_the_stage_does_not_measure_ends_the_sweep_after_one_trial(measured: Path) -> None:
    state = sweep(["train.learning_rate=0.001,0.002"], objective="train.los", return_state=True)

    assert (state.type, state.message) == ("FAILED", "objective 'train.los': `train` measures train.loss, train.steps")
    assert (measured / ".state" / "ran.log").read_text().split() == ["pack", "train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a sweep varies at least one param"),
        (["--param", "train.lora_r=0,8", "--objective", "train.loss"], "train.lora_r: Input should be greater"),
        (["--param", "train.lora=4,8", "--objective", "train.loss"], "train.lora: unknown key; did you mean 'lora_r'"),
        (["--param", "merge.tolerance=1.0,2.0", "--objective", "train.loss"], "no stage of this run reads it"),
        (["--param", "train.lora_r=4,8"], "objective 'evaluate.tuned.loss': write STAGE.FIGURE"),
        (
            ["--param", "train.lora_r=4,8", "--set", "train.lora_r=2", "--objective", "train.loss"],
            "train.lora_r is both varied and overridden",
        ),
        (
            ["--param", "train.lora_r=4,8", "--objective", "train.loss", "--write", "a/b.yaml"],
            "the folder does not exist",
        ),
    ],
)
def test_sweep_that_makes_no_sense_is_refused_before_a_trial(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "parameters",
    [
        {"params": []},
        {"params": ["train.lora_r"]},
        {"params": ["train.lora_r=1"], "search": "guess"},
        {"params": ["train.lora_r=1"], "trials": 0},
        {"params": ["train.lora_r=1"], "objective": "loss"},
    ],
)
def test_form_refuses_a_wrong_value(parameters: dict[str, Any]) -> None:
    schema = sweep.parameters.model_dump_for_openapi()
    jsonschema.validate({"params": ["train.lora_r=1,2"], "objective": "evaluate.tuned.loss:min"}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parameters, schema)
