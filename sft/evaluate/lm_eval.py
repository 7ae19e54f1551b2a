"""Tasks of lm-eval (EleutherAI's evaluation harness), run by the package lm-eval, which is an optional extra.

lm-eval needs half a minute to index its thousands of tasks. The user's folder of task files is therefore indexed first,
and the index of lm-eval is only built if a task is not found there.
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
"""Number of draws for the standard error of figures that are not means over rows; lm-eval's 100,000 take minutes."""


@dataclass(frozen=True)
class HarnessResult:
    """Results of one model.

    Args:
        figures: `task.metric` -> value, such as `arc_easy.acc`. The name of a filter is joined to the metric by `_`.
        errors: `task.metric` -> standard error, for figures that have one.
        tasks: Task -> `num_rows`, the number of evaluated rows, and `num_fewshot`, the number of examples before each;
            None if lm-eval does not report it, as for a group.
    """

    figures: dict[str, float]
    errors: dict[str, float]
    tasks: dict[str, dict[str, int | None]]


@dataclass(frozen=True)
class HarnessOptions:
    """Options of a run.

    Args:
        limit: Number of rows of each task, from its beginning; None for all.
        num_fewshot: Number of examples before each row; None for the task's default.
        apply_chat_template: Whether to ask as a user turn in the tokenizer's chat template instead of as plain text.
        batch_size: Number of requests per batch.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 8


def check_harness() -> None:
    """Check that lm-eval is installed, without importing it.

    Raises:
        ValueError: It is not; the message contains the `pip install` command.
    """
    if find_spec(PACKAGE) is None:
        raise ValueError(f"the package {EXTRA} is not installed; it is an optional extra: pip install '.[{EXTRA}]'")


class Harness:
    """Loaded tasks, ready to run on models.

    Args:
        tasks: Names of tasks, groups or tags.
        folder: Folder with YAML files of the user's tasks, in addition to those of lm-eval; None for none.

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
            except Exception as error:
                # errors come from the hub, `datasets` or the task's code; add the task's name to all
                reason = " ".join(str(error).split())[:400]
                raise ValueError(f"the task {name} cannot be loaded: {type(error).__name__}: {reason}") from error

    def measure(self, model: Any, tokenizer: Any, options: HarnessOptions) -> HarnessResult:
        """Run all tasks on a model.

        Args:
            model: Model on its device, in eval mode.
            tokenizer: Tokenizer of the model.
            options: See `HarnessOptions`.
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
            f"lm-eval has no task {unknown[0]!r}, and no readable YAML file in your folder of tasks defines it{hint}"
        )
    return manager


def read_results(found: Mapping[str, Any], asked: Sequence[str]) -> HarnessResult:
    """Return the figures of the requested tasks from a result of lm-eval.

    For a group, the figures of the group are returned and not those of its tasks, unless they are requested too.

    Args:
        found: Result of `lm_eval.simple_evaluate`.
        asked: Names of the requested tasks.
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
    """Return the name of a task or metric as it is written in a gate.

    Each character that is not a letter, digit or `_` is replaced by `_`.
    """
    return re.sub(r"\W", "_", name)
