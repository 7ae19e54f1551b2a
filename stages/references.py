"""The held-out prompts and what they should be answered with, checked against the task."""

from __future__ import annotations

from typing import Any

from sft.tasks import Task
from stages.artifacts import read_jsonl
from stages.params import EvaluateSection
from stages.paths import Paths
from stages.scoring import task_names


def read_prompts(section: EvaluateSection, task: Task, paths: Paths) -> list[dict[str, Any]]:
    """Read the first `num_rows` held-out prompts that `format` wrote.

    Args:
        section: Of params.yaml.
        task: What the answers will be scored with.
        paths: Of the checkout.

    Raises:
        ValueError: There is no prompt, or a reference that the task can't be scored against; names the row.
    """
    prompts = list(read_jsonl(paths.out("format", "prompts.jsonl")))[: section.num_rows]
    if not prompts:
        raise ValueError(
            "no held-out row has a turn to answer: evaluate needs conversations or prompts with completions"
        )
    for prompt in prompts:
        try:
            task.check_reference(prompt["reference"])
        except ValueError as error:
            raise ValueError(
                f"evaluate.task is {', '.join(task_names(section.task))}, held-out row {prompt['id']}: {error}"
            ) from None
    return prompts
