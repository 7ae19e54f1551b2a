"""Types of the section `evaluate` of params.yaml: tasks, general prompts, conditions."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from stages.params.section import Positive, Section
from stages.params.tasks import FOLDER, figure_names


def _known_tasks(value: str | list[str]) -> str | list[str]:
    figure_names(value)
    return value


def _in_folder(value: str) -> str:
    if not value.startswith(f"{FOLDER}/") or ".." in value.split("/"):
        raise ValueError(f"the file must lie in {FOLDER}/, where `evaluate` sees its changes and training does not")
    return value


Tasks = Annotated[str | list[str], AfterValidator(_known_tasks)]
OwnFile = Annotated[str, AfterValidator(_in_folder)]


class RegressionSection(Section):
    """General prompts, which must not get worse by the training."""

    path: Annotated[OwnFile | None, Field(description="File of rows in tasks/; null = none are looked at")]
    task: Annotated[Tasks | None, Field(description="What answers are scored with; null = losses only")]
    max_new_tokens: Annotated[Positive, Field(description="Longest answer")]


def _all_different(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"every task can be stated once, found {', '.join(twice)} twice")
    return names


HarnessTask = Annotated[str, Field(min_length=1)]


class LmEvalSection(Section):
    """Tasks of lm-eval, an optional extra."""

    tasks: Annotated[list[HarnessTask], AfterValidator(_all_different), Field(description="Names; [] = none are run")]
    limit: Annotated[Positive | None, Field(description="Rows of each task; null = all")]
    num_fewshot: Annotated[int | None, Field(ge=0, description="Examples before each row; null = as the task has it")]
    apply_chat_template: Annotated[bool, Field(description="Ask in the chat template, not as plain text")]
    batch_size: Annotated[Positive, Field(description="Requests computed at a time")]


class EvaluateSection(Section):
    """Base, tuned, merged and quantized side by side."""

    task: Annotated[Tasks, Field(description="What answers are scored with, one or several")]
    num_rows: Annotated[Positive | None, Field(description="null = every held-out row")]
    batch_size: Annotated[Positive, Field(description="Rows generated at a time")]
    max_new_tokens: Annotated[Positive, Field(description="Longest generation")]
    regression: Annotated[RegressionSection, Field(description="General prompts that must not get worse")]
    lm_eval: Annotated[LmEvalSection, Field(description="Tasks of lm-eval by name")]
    gate: Annotated[list[str], Field(description="Conditions that must hold before the champion is replaced")]
