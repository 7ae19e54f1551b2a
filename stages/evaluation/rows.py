"""What models are measured on: rows, prompts, and what those should be answered with, checked against the task.

General prompts, which a training must not make worse: a file in tasks/, rendered with the run's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.messages import RowError, validate_record
from sft.data.records import detect_layout, normalize
from sft.data.sources import data_files, read_rows
from sft.evaluate.tasks import Task
from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import EvaluateSection, RegressionSection
from stages.params.tasks import load_tasks, task_names

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


KEY = "evaluate.regression"


def read_records(section: RegressionSection, root: Path) -> list[dict[str, Any]]:
    """The rows of the file as records, each with an id; none where params.yaml names no file.

    Args:
        section: Of params.yaml.
        root: The checkout.

    Raises:
        ValueError: The file is missing or empty, or a row can't be trained on either; names the row.
    """
    if section.path is None:
        return []
    try:
        rows = [row for file in data_files(root / section.path) for row in read_rows(file)]
        layout = detect_layout({name for row in rows for name in row.columns})
    except ValueError as error:
        raise ValueError(f"params.yaml, {KEY}.path: {error}") from error
    records = []
    for row in rows:
        try:
            record = normalize(row.columns, layout, prune_nulls=row.from_arrow)
        except RowError as error:
            raise ValueError(f"params.yaml, {KEY}.path: {row.id}: {error}") from error
        problems = validate_record(record)
        if problems:
            raise ValueError(f"params.yaml, {KEY}.path: {row.id}: {'; '.join(p.detail for p in problems)}")
        records.append({"id": row.id, **record})
    return records


def render_records(
    records: list[dict[str, Any]], section: RegressionSection, tokenizer: PreTrainedTokenizerBase, root: Path
) -> EvalRows:
    """Records as tokens, and as prompts where there is a task.

    Rows are taken as they are: no system message of the training rows is put before them.

    Args:
        records: What `read_records` gave, at least one.
        section: Of params.yaml.
        tokenizer: Of the run, with its chat template.
        root: The checkout, for tasks of one's own.

    Raises:
        ValueError: The template refuses a row, or an answer can't be scored against; names the row.
    """
    # `python -m stages check` only reads the rows, and need not wait for transformers
    from sft.chat.render import ChatRenderer
    from sft.tokens.encoding import encode_batch

    renderer = ChatRenderer(tokenizer)
    rows = [dict(row) for row in encode_batch([renderer.render(record) for record in records], tokenizer)]
    if section.task is None:
        return EvalRows(rows, [], [], Task(()), section.max_new_tokens)
    task = load_tasks(section.task, root)
    turns = [(record["id"], renderer.last_turn(record)) for record in records]
    prompts = [{"id": name, **turn._asdict()} for name, turn in turns if turn is not None]
    check_references(prompts, task, f"{KEY}.task", "row")
    return EvalRows.of(rows, prompts, tokenizer, task, section.max_new_tokens)
