"""The best evaluated step is shipped, not the last; early stopping; a resumed training chooses the same."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM

from sft.evaluate.likelihood import evaluate_model
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.params.schema import ParamsError, SelectSection, load_params
from stages.training.selection import best_step, is_exhausted, missing_best, selection_record
from tests.stages.training_root import make_training_root, packed_row, set_params, train_here

OVERFITTING: dict[str, Any] = {
    "method": "full",
    "max_steps": 96,
    "eval_steps": 8,
    "save_steps": 24,
    "learning_rate": 2e-2,
}


def section(**values: Any) -> SelectSection:
    return SelectSection(**{"metric": "eval_loss", "mode": None, "patience": None, "min_delta": 0.0, **values})


def history(*losses: float, **others: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": step, "eval_loss": loss, **{name: values[step - 1] for name, values in others.items()}}
        for step, loss in enumerate(losses, start=1)
    ]


def test_best_step_has_the_best_value_then_the_lower_loss_then_is_the_earlier() -> None:
    assert best_step(history(3.0, 1.0, 2.0), section()) == 2
    assert best_step(history(3.0, 1.0, 1.0), section()) == 2
    assert best_step(history(3.0, math.nan, 2.0), section()) == 3
    assert best_step(history(3.0, 1.0, 2.0), section(metric=None)) is None
    assert best_step([], section()) is None
    scores = [0.5, 0.75, 0.75]
    assert best_step(history(3.0, 2.0, 1.0, sample_exact_match=scores), section(metric="exact_match")) == 3
    assert best_step(history(3.0, 2.0, 1.0, sample_exact_match=scores), section(metric="exact_match", mode="min")) == 1
    accuracy = [0.5, 0.25, 0.25]
    assert (
        best_step(history(3.0, 2.0, 1.0, eval_mean_token_accuracy=accuracy), section(metric="eval_mean_token_accuracy"))
        == 1
    )


def test_patience_counts_evaluations_without_an_improvement_of_min_delta() -> None:
    losses = (3.0, 2.0, 1.95, 1.9, 1.91)
    assert not is_exhausted(history(*losses), section())
    assert not is_exhausted(history(*losses), section(patience=2))
    assert is_exhausted(history(*losses), section(patience=3, min_delta=0.2))
    assert is_exhausted(history(*losses), section(patience=1))
    assert best_step(history(*losses), section(patience=3, min_delta=0.2)) == 4  # what is shipped is the best one


def test_record_says_what_was_shipped_and_what_the_last_step_had() -> None:
    record = selection_record(history(3.0, 1.0, 2.0), section(patience=1), last_step=3, max_steps=9)
    assert record == {
        "metric": "eval_loss",
        "higher_is_better": False,
        "step": 2,
        "value": 1.0,
        "last_step": 3,
        "last_value": 2.0,
        "stopped_early": True,
        "max_steps": 9,
        "evaluations": [{"step": 1, "value": 3.0}, {"step": 2, "value": 1.0}, {"step": 3, "value": 2.0}],
    }
    last = selection_record(history(3.0, 1.0, 2.0), section(metric=None), last_step=3, max_steps=3)
    assert (last["step"], last["metric"], last["stopped_early"]) == (3, None, False)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = make_overfitting_root(tmp_path_factory.mktemp("overfitted"))
    train_here(paths)
    return paths


def make_overfitting_root(root: Path, **train: Any) -> Paths:
    """A checkout whose four training rows are soon known by heart."""
    paths = make_training_root(root, **OVERFITTING, **train)
    shutil.rmtree(paths.out("pack", "train"))
    Dataset.from_list([packed_row(number) for number in range(4)]).save_to_disk(str(paths.out("pack", "train")))
    return paths


def losses_of(paths: Paths) -> dict[int, float]:
    with paths.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row["eval_loss"]) for row in csv.DictReader(file) if row["eval_loss"]}


def shipped_loss(paths: Paths) -> float:
    model = AutoModelForCausalLM.from_pretrained(paths.out("train", "model"))
    rows = load_from_disk(str(paths.out("pack", "eval"))).to_list()
    return float(evaluate_model(model.eval(), rows, tokens_per_batch=2048)["loss"])


def test_best_step_of_an_overfitted_training_is_shipped(overfitted: Paths) -> None:
    losses, record, metrics = (
        losses_of(overfitted),
        read_json(overfitted.out("train", "selection.json")),
        read_json(overfitted.metrics("train")),
    )
    best = min(losses, key=losses.__getitem__)
    assert best < 96
    assert losses[96] > losses[best] * 1.02
    assert record["step"] == metrics["shipped_step"] == best
    assert (metrics["steps"], metrics["eval_loss"], metrics["last_eval_loss"]) == (96, losses[best], losses[96])
    assert shipped_loss(overfitted) == pytest.approx(losses[best], rel=1e-4)


def test_training_that_stops_early_ships_the_same_step(overfitted: Paths, tmp_path: Path) -> None:
    best = read_json(overfitted.out("train", "selection.json"))["step"]
    select = {**section().model_dump(), "patience": 2}
    paths = make_overfitting_root(tmp_path, select=select)
    train_here(paths)
    record = read_json(paths.out("train", "selection.json"))
    assert record["stopped_early"]
    assert (record["step"], record["last_step"]) == (best, best + 16)
    name = "model/model.safetensors"
    assert paths.out("train", name).read_bytes() == overfitted.out("train", name).read_bytes()


def test_resumed_training_chooses_the_same_and_one_without_its_best_weights_goes_further_back(
    overfitted: Paths, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(overfitted.root, tmp_path / "root")
    paths = Paths(tmp_path / "root")
    set_params(paths.root, **OVERFITTING)
    values = load_params(overfitted.root / "params.yaml").model_dump()
    (paths.root / "params.yaml").write_text(json.dumps(values))  # the same base, so that the state is the same
    (state,) = paths.state.glob("train/*")
    (state / "finished").unlink()
    shutil.rmtree(state / "checkpoint-96")
    shutil.rmtree(paths.out("train"))
    best = read_json(overfitted.out("train", "selection.json"))["step"]
    assert missing_best(state / "checkpoint-72", section()) is None
    train_here(paths)
    assert "resuming from checkpoint-72" in capfd.readouterr().out
    for name in ("model/model.safetensors", "selection.json", "curve.csv"):
        assert paths.out("train", name).read_bytes() == overfitted.out("train", name).read_bytes(), name
    (state / f"best-{best}" / "model.safetensors").write_bytes(b"")
    problem = missing_best(state / "checkpoint-72", section())
    assert problem is not None
    assert problem.startswith(f"the weights of step {best}, the best until then, can't be used: model")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"select": {"metric": "exact_mach"}}, r"train: select\.metric 'exact_mach' .*; did you mean 'exact_match'\?"),
        ({"select": {"metric": None, "patience": 3}}, r"mode and patience would be ignored without a metric"),
        ({"samples": {"task": "tasks.own.score"}}, r"tasks\.own\.score can't score answers during training"),
        (
            {"select": {"metric": "exact_match"}, "samples": {"count": 0}},
            r"with train\.samples\.count and task, there are figures of answers",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, train: dict[str, Any], message: str) -> None:
    shipped = load_params(Path(__file__).resolve().parents[3] / "params.yaml").train.model_dump()
    set_params(tmp_path, **{name: shipped[name] | values for name, values in train.items()})
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")
