"""Choice of the step that is shipped, early stopping, and the weights of the best step so far.

The choice is a function of the trainer's log, which is part of every checkpoint. A resumed training therefore chooses
as one that was never interrupted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from stages.checkout.artifacts import read_json
from stages.params.schema import EVAL_FIGURES, SelectSection
from stages.training.checkpoints import seal, what_is_wrong

SAMPLE_PREFIX = "sample_"
"""Prefix of the figures of answers in the trainer's log and in the curve."""

TRAINER_STATE = "trainer_state.json"

History = Sequence[Mapping[str, Any]]


class Evaluation(NamedTuple):
    """Figures of one evaluation.

    Args:
        step: Optimizer step after which the model was evaluated.
        value: The figure that is selected by.
        loss: Held-out loss, which decides among steps of equal value.
    """

    step: int
    value: float
    loss: float


def column_of(metric: str) -> str:
    """Return the name of a metric in the trainer's log."""
    return metric if metric in EVAL_FIGURES else f"{SAMPLE_PREFIX}{metric}"


def evaluations(history: History, metric: str) -> list[Evaluation]:
    """Return the evaluations that have the metric, in the order of their steps."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(entry["step"], {}).update(entry)
    column = column_of(metric)
    return [
        Evaluation(step, float(entry[column]), float(entry.get("eval_loss", math.nan)))
        for step, entry in sorted(steps.items())
        if column in entry and "eval_loss" in entry
    ]


def best_step(history: History, section: SelectSection) -> int | None:
    """Return the step with the best value; among equal values that of the lower held-out loss, then the earlier.

    Returns:
        None if the section names no metric or there is no evaluation with a finite value.
    """
    if section.metric is None:
        return None
    sign = -1.0 if section.higher_is_better() else 1.0
    found = [one for one in evaluations(history, section.metric) if math.isfinite(one.value)]
    return min(found, key=lambda one: (sign * one.value, one.loss, one.step)).step if found else None


def is_exhausted(history: History, section: SelectSection) -> bool:
    """Return whether the last `patience` evaluations are without an improvement of more than `min_delta`."""
    if section.metric is None or section.patience is None:
        return False
    sign = -1.0 if section.higher_is_better() else 1.0
    best, without = math.inf, 0
    for one in evaluations(history, section.metric):
        value = sign * one.value
        without += 1
        if value < best - (section.min_delta if math.isfinite(best) else 0.0):
            best, without = value, 0
    return without >= section.patience


def best_folder(state_folder: Path, step: int) -> Path:
    """Return the folder with the weights of a step that was the best one when it was evaluated."""
    return state_folder / f"best-{step}"


def missing_best(checkpoint: Path, section: SelectSection) -> str | None:
    """Return why the best weights that a checkpoint refers to can't be used; None if they can, or it needs none."""
    state = read_json(checkpoint / TRAINER_STATE)
    step = best_step(state.get("log_history", []), section)
    if step is None or step == state["global_step"] == state["max_steps"]:
        return None
    folder = best_folder(checkpoint.parent, step)
    problem = what_is_wrong(folder) if folder.exists() else "they are missing"
    return None if problem is None else f"the weights of step {step}, the best until then, can't be used: {problem}"


class KeepBest(TrainerCallback):
    """Callback that saves the weights of each step that is the best so far, and stops the training early.

    The figures of an evaluation must be in the log by then, so this callback comes after those that add figures.

    Args:
        section: Section `train.select` of params.yaml.
        save: Writes the model, gathered from all processes, into a folder. All processes call it.
    """

    def __init__(self, section: SelectSection, save: Callable[[Path], None]) -> None:
        self._section, self._save = section, save

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the weights if no earlier step is better; stop if patience has run out."""
        history, folder = state.log_history, best_folder(Path(args.output_dir), state.global_step)
        # those of the last step need no copy
        if best_step(history, self._section) == state.global_step < state.max_steps:
            self._save(folder)
            if state.is_world_process_zero:
                seal(folder)
        if state.global_step < state.max_steps and is_exhausted(history, self._section):
            control.should_training_stop = True
            control.should_save = False  # a training that is resumed must come to this evaluation again
            if state.is_world_process_zero:
                print(
                    f"stopped early at step {state.global_step} of {state.max_steps}: {self._section.metric} has not "
                    f"improved in {self._section.patience} evaluations",
                    flush=True,
                )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete weights that neither the training nor one of its checkpoints needs."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        histories = [state.log_history]
        histories += [read_json(file)["log_history"] for file in folder.glob(f"checkpoint-*/{TRAINER_STATE}")]
        needed = {best_folder(folder, step) for history in histories if (step := best_step(history, self._section))}
        for kept in folder.glob("best-*"):
            if kept not in needed:
                shutil.rmtree(kept)


def selection_record(history: History, section: SelectSection, last_step: int, max_steps: int) -> dict[str, Any]:
    """Return what was shipped and why, for outs/train/selection.json.

    Args:
        history: The trainer's log.
        section: Section `train.select` of params.yaml.
        last_step: Last step of the training.
        max_steps: Step at which it would have ended without early stopping.
    """
    chosen = best_step(history, section)
    found = evaluations(history, section.metric or "eval_loss")
    values = {one.step: one.value for one in found}
    step = last_step if chosen is None else chosen
    return {
        "metric": section.metric,
        "higher_is_better": section.higher_is_better() if section.metric else None,
        "step": step,
        "value": values.get(step),
        "last_step": last_step,
        "last_value": values.get(last_step),
        "stopped_early": last_step < max_steps,
        "max_steps": max_steps,
        "evaluations": [{"step": one.step, "value": one.value} for one in found],
    }
