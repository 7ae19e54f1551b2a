"""Tasks of lm-eval (EleutherAI's evaluation harness) by name, run by its own library, which is an optional extra.

lm-eval knows thousands of tasks and takes half a minute to look through them; a folder with task files of one's own is
looked at first, and alone when all tasks are found there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft.suggest import did_you_mean

PACKAGE, EXTRA = "lm_eval", "lm-eval"
BOOTSTRAP_ITERS = 1000
"""Draws for the standard error of figures that are no means over rows; lm-eval's own 100,000 take minutes."""


@dataclass(frozen=True)
class HarnessResult:
    """What one model did.

    Args:
        figures: `task.metric` -> value, such as `arc_easy.acc`; a filter's name is joined to the metric's by `_`.
        errors: `task.metric` -> standard error, where lm-eval gives one.
        tasks: Task -> rows that were evaluated, and examples shown before each; None where lm-eval says none, as for a
            group.
    """

    figures: dict[str, float]
    errors: dict[str, float]
    tasks: dict[str, dict[str, int | None]]


@dataclass(frozen=True)
class HarnessOptions:
    """How tasks are run.

    Args:
        limit: Rows of each task, from its beginning; None = all.
        num_fewshot: Examples shown before each row; None = what the task states.
        apply_chat_template: Ask as a user's turn in the tokenizer's chat template, rather than as plain text.
        batch_size: Requests computed at a time.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 8


def check_harness() -> None:
    """Look for the package without importing it.

    Raises:
        ValueError: Names the extra.
    """
    if find_spec(PACKAGE) is None:
        raise ValueError(f"the package {EXTRA} is not installed, which is an extra: pip install '.[{EXTRA}]'")


class Harness:
    """Tasks that are known and whose data can be read.

    Args:
        tasks: Names of tasks, groups or tags.
        folder: With YAML files of one's own tasks, beside those that come with lm-eval; None for none.

    Raises:
        ValueError: lm-eval is not installed, a name is unknown, or a task's files or data can't be read.
    """

    def __init__(self, tasks: Sequence[str], folder: Path | None = None) -> None:
        check_harness()
        self.tasks = list(tasks)
        self._manager = _find_tasks(self.tasks, folder)
        for name in self.tasks:
            try:
                self._manager.load([name])
            except Exception as error:  # of the hub, of `datasets`, of a task's own code: whatever it is, say whose
                reason = " ".join(str(error).split())[:400]
                raise ValueError(f"the task {name} can't be loaded: {type(error).__name__}: {reason}") from error

    def measure(self, model: Any, tokenizer: Any, options: HarnessOptions) -> HarnessResult:
        """Run all tasks on a model.

        Args:
            model: On its device, in eval mode.
            tokenizer: Its own.
            options: How.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            device=str(next(model.parameters()).device),
            batch_size=options.batch_size,
        )
        found: Any = lm_eval.simple_evaluate(
            wrapped,
            tasks=self.tasks,
            task_manager=self._manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.apply_chat_template,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )
        return read_results(found, self.tasks)


def _find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        hint = did_you_mean(unknown[0], manager.task_index, before="; ")
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}, and no YAML file of your own that can be read defines it{hint}"
        )
    return manager


def read_results(found: Mapping[str, Any], asked: Sequence[str]) -> HarnessResult:
    """The figures of the tasks that were asked for, in lm-eval's own result.

    Of a group its own figures are taken, and not those of its many tasks.
    """
    below = {name for names in found.get("group_subtasks", {}).values() for name in names}
    figures: dict[str, float] = {}
    errors: dict[str, float] = {}
    tasks: dict[str, dict[str, int | None]] = {}
    for task, values in found["results"].items():
        if task not in asked and task in below:
            continue
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            into = errors if metric.endswith("_stderr") else figures
            name = metric.removesuffix("_stderr") + (f"_{chosen}" if chosen != "none" else "")
            into[f"{figure_part(task)}.{figure_part(name)}"] = float(value)
        rows = found.get("n-samples", {}).get(task, {}).get("effective")
        tasks[task] = {"num_rows": rows, "num_fewshot": found.get("n-shot", {}).get(task)}
    return HarnessResult(figures, {name: value for name, value in errors.items() if name in figures}, tasks)


def figure_part(name: str) -> str:
    """A task's or a metric's name as it can stand in a gate."""
    return re.sub(r"\W", "_", name)
