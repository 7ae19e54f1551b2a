"""The held-out prompts and what they should be answered with, checked against the task."""

from __future__ import annotations

from typing import Any

from sft.metrics import TASKS
from stages.artifacts import read_jsonl
from stages.params import EvaluateSection
from stages.paths import Paths


def read_prompts(section: EvaluateSection, paths: Paths) -> list[dict[str, Any]]:
    """Read the first `num_rows` held-out prompts that `format` wrote.

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
            TASKS[section.task].check_reference(prompt["reference"])
        except ValueError as error:
            raise ValueError(f"evaluate.task is {section.task}, held-out row {prompt['id']}: {error}") from None
    return prompts
