"""Tasks that `evaluate.task` names: those of `sft.evaluate.tasks`, and functions of the user in the folder tasks/.

Functions must lie in tasks/ because DVC tracks that folder: after a change of a function, `evaluate` runs again.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from sft.evaluate.tasks import Task, check_packages, find_task, join_tasks
from sft.suggest import did_you_mean

FOLDER = "tasks"

OWN = re.compile(rf"{FOLDER}\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
TAKEN = {"loss", "perplexity", "token_accuracy", "kl", "size_mb", "stop_rate", "equal_answers", "same_prompts"}
"""Figures that every evaluation, or every engine, has."""


def task_names(value: str | list[str]) -> list[str]:
    """Return the names of tasks as a list.

    Args:
        value: `evaluate.task`, one name or a list.
    """
    return [value] if isinstance(value, str) else value


def figure_names(value: str | list[str]) -> tuple[str, ...]:
    """Return the names of the figures that tasks will have, without importing code from tasks/.

    Args:
        value: `evaluate.task`.

    Raises:
        ValueError: A name is unknown, or two tasks would have the same figure.
    """
    names = task_names(value)
    if not names:
        raise ValueError("state at least one task")
    tasks = [_declared(name) for name in names]
    own = [name.rpartition(".")[2] for name in names if name.startswith(f"{FOLDER}.")]
    others = [name for task in tasks for name in task.names]
    for name in own:
        if name in TAKEN or others.count(name) > 1:
            raise ValueError(f"two figures would be called {name!r}; rename the function in {FOLDER}/")
    if len(set(names)) < len(names) or others.count("regex_match") > 1:
        raise ValueError(f"every task can be stated once, regex too, found {', '.join(names)}")
    return join_tasks(tasks).names


def load_tasks(value: str | list[str], root: Path) -> Task:
    """Load tasks and join them into one.

    Args:
        value: `evaluate.task`.
        root: The checkout, which contains the folder tasks/.

    Raises:
        ValueError: A name is unknown, a package is missing, or a function in tasks/ can't be used.
    """
    tasks = []
    for name in task_names(value):
        task = _declared(name)
        if own := OWN.fullmatch(name):
            score = functools.partial(_score_own, _load_function(root, *own.groups()), name)
            task = Task(task.names, score)
        check_packages(task)
        tasks.append(task)
    return join_tasks(tasks)


def _declared(name: str) -> Task:
    """Return a task by name. A function in tasks/ is not imported yet; its figure has the function's name."""
    if own := OWN.fullmatch(name):
        return Task((own[2],))
    if name.startswith(f"{FOLDER}.") or ("." in name and not name.startswith("regex:")):
        raise ValueError(
            f"task {name!r}: a function of your own is written {FOLDER}.FILE.FUNCTION and lies in {FOLDER}/FILE.py, "
            "where DVC sees its changes"
        )
    return find_task(name)


def _load_function(root: Path, module: str, function: str) -> Callable[..., Any]:
    path = root / FOLDER / f"{module}.py"
    if not path.is_file():
        files = [file.stem for file in path.parent.glob("*.py")]
        hint = did_you_mean(module, files, before="; ", shown=lambda file: f"{FOLDER}.{file}.{function}", cutoff=0.5)
        raise ValueError(f"task {FOLDER}.{module}.{function}: there is no file {FOLDER}/{module}.py{hint}")
    spec = spec_from_file_location(f"{FOLDER}.{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise ValueError(f"{FOLDER}/{module}.py can't be loaded: {type(error).__name__}: {error}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        hint = did_you_mean(function, vars(loaded), before="; ")
        raise ValueError(f"{FOLDER}/{module}.py has no function {function!r}{hint}")
    return found


def _score_own(function: Callable[..., Any], name: str, prediction: str, reference: str) -> dict[str, float]:
    """Score an answer with a function of the user; an error names the answer and the reference."""
    place = f"task {name}, answer {prediction[:60]!r}, reference {reference[:60]!r}"
    try:
        value = function(prediction, reference)
    except Exception as error:
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise ValueError(f"{place}: returned {value!r}; a number is needed, or True and False")
    return {name.rpartition(".")[2]: float(value)}
