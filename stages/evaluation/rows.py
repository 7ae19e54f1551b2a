"""What models are measured on: rows, prompts, and what those should be answered with, checked against the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.evaluate.tasks import Task
from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import EvaluateSection
from stages.params.tasks import task_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalRows:
    """One set of rows that all models are measured on.

    Args:
        rows: Token rows with labels, for losses.
        prompts: With id, prompt and reference, for answers.
        token_ids: Of the prompts.
        task: What answers are scored with.
        max_new_tokens: Longest answer.
    """

    rows: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    token_ids: list[list[int]]
    task: Task
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        rows: list[dict[str, Any]],
        prompts: list[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_new_tokens: int,
    ) -> EvalRows:
        """Tokenize the prompts."""
        token_ids = [
            tokenizer(prompt["prompt"], add_special_tokens=prompt["add_special_tokens"])["input_ids"]
            for prompt in prompts
        ]
        return cls(rows, prompts, token_ids, task, max_new_tokens)

    @property
    def references(self) -> list[str]:
        """What the prompts should be answered with."""
        return [prompt["reference"] for prompt in self.prompts]

    @property
    def num_documents(self) -> int:
        """Documents in the rows."""
        return sum(len(row.get("seq_lengths") or [0]) for row in self.rows)


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
    check_references(prompts, task, f"evaluate.task is {', '.join(task_names(section.task))}", "held-out row")
    return prompts


def check_references(prompts: Sequence[dict[str, Any]], task: Task, asked: str, what: str) -> None:
    """Make sure that every answer can be scored.

    Args:
        prompts: With references.
        task: What answers will be scored with.
        asked: Where params.yaml asks for it, for messages.
        what: What a prompt is, for messages.

    Raises:
        ValueError: Names the row.
    """
    for prompt in prompts:
        try:
            task.check_reference(prompt["reference"])
        except ValueError as error:
            raise ValueError(f"{asked}, {what} {prompt['id']}: {error}") from None
