"""Rows that models are measured on: held-out rows, and general prompts that training should not make worse.

Each set has token rows for losses, and prompts with references for answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.messages import IMAGE_COLUMNS, RowError, validate_record
from sft.data.records import detect_layout, normalize
from sft.data.sources import data_files, read_rows
from sft.evaluate.tasks import Task
from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.params.figures import REGRESSION, TEST
from stages.params.schema import EvaluateSection, RegressionSection
from stages.params.tasks import load_tasks, task_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KEYS = {REGRESSION: "evaluate.regression.path", TEST: "evaluate.test"}
"""Prefix of the figures of other rows -> the key of params.yaml that names their file."""


@dataclass(frozen=True)
class EvalRows:
    """One set of rows that all models are measured on.

    Args:
        rows: Token rows with labels, for losses.
        prompts: Prompts with `id`, `prompt` and `reference`, for answers.
        token_ids: Token ids of the prompts.
        task: The task that scores answers.
        max_new_tokens: Largest number of tokens in an answer.
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
        """Create the set from prompts as text, which are tokenized, and references, which become what is decoded."""
        # imported here, as `python -m stages check` only reads the rows and need not wait for torch
        from sft.evaluate.generation import reference_text

        token_ids = [
            tokenizer(prompt["prompt"], add_special_tokens=prompt["add_special_tokens"])["input_ids"]
            for prompt in prompts
        ]  # of prompts with images, those of the text alone; `prompts_with_images` lists them
        prompts = [
            {**prompt, "reference": reference_text(prompt["prompt"], prompt["reference"], tokenizer)}
            for prompt in prompts
        ]
        return cls(rows, prompts, token_ids, task, max_new_tokens)

    @property
    def prompts_with_images(self) -> list[int]:
        """Numbers of the prompts that have images."""
        return [number for number, prompt in enumerate(self.prompts) if prompt.get("images")]

    @property
    def references(self) -> list[str]:
        """Expected answers, one for each prompt."""
        return [prompt["reference"] for prompt in self.prompts]

    @property
    def num_documents(self) -> int:
        """Number of documents in the rows."""
        return sum(len(row.get("seq_lengths") or [0]) for row in self.rows)


def read_prompts(section: EvaluateSection, task: Task, paths: Paths) -> list[dict[str, Any]]:
    """Read the first `num_rows` held-out prompts that `format` wrote.

    Args:
        section: Section `evaluate` of params.yaml.
        task: The task that scores answers.
        paths: The checkout.

    Raises:
        ValueError: There are no prompts, or the task can't score against a reference; names the row.
    """
    prompts = list(read_jsonl(paths.out("format", "prompts.jsonl")))[: section.num_rows]
    if not prompts:
        raise ValueError(
            "no held-out row has a turn to answer: evaluate needs conversations or prompts with completions"
        )
    check_references(prompts, task, f"evaluate.task is {', '.join(task_names(section.task))}", "held-out row")
    return prompts


def check_references(prompts: Sequence[dict[str, Any]], task: Task, asked: str, what: str) -> None:
    """Check that the task can score answers against all references.

    Args:
        prompts: Prompts with `id` and `reference`.
        task: The task that scores answers.
        asked: Key of params.yaml that names the task, for the message.
        what: What a prompt is called in the message.

    Raises:
        ValueError: A reference does not suit the task; names the row.
    """
    for prompt in prompts:
        try:
            task.check_reference(prompt["reference"])
        except ValueError as error:
            raise ValueError(f"{asked}, {what} {prompt['id']}: {error}") from None


def test_rows(section: EvaluateSection) -> RegressionSection:
    """Return the file of test rows as a section like that of general prompts, with the task of the held-out rows."""
    return RegressionSection(path=section.test, task=section.task, max_new_tokens=section.max_new_tokens)


def read_records(section: RegressionSection, root: Path, key: str = KEYS[REGRESSION]) -> list[dict[str, Any]]:
    """Read a file of general prompts or test rows as records with ids; return none if params.yaml names no file.

    Args:
        section: Section `evaluate.regression` of params.yaml, or `test_rows`.
        root: The checkout.
        key: Its key in params.yaml, for messages.

    Raises:
        ValueError: The file is missing or empty, or a row is invalid; names the row.
    """
    if section.path is None:
        return []
    try:
        rows = [row for file in data_files(root / section.path) for row in read_rows(file)]
        layout = detect_layout({name for row in rows for name in row.columns})
    except ValueError as error:
        raise ValueError(f"params.yaml, {key}: {error}") from error
    records = []
    for row in rows:
        images = [name for name in IMAGE_COLUMNS if row.columns.get(name)]
        if images:
            raise ValueError(
                f"params.yaml, {key}: {row.id}: the column {images[0]} holds images, and these rows are text alone; "
                "remove it"
            )
        try:
            record = normalize(row.columns, layout, prune_nulls=row.has_added_nulls)
        except RowError as error:
            raise ValueError(f"params.yaml, {key}: {row.id}: {error}") from error
        problems = validate_record(record)
        if problems:
            raise ValueError(f"params.yaml, {key}: {row.id}: {'; '.join(p.detail for p in problems)}")
        records.append({"id": row.id, **record})
    if len(records) == 1:
        raise ValueError(f"params.yaml, {key}: {section.path} has one row, and intervals need at least two")
    return records


def render_records(
    records: list[dict[str, Any]],
    section: RegressionSection,
    tokenizer: PreTrainedTokenizerBase,
    root: Path,
    key: str = KEYS[REGRESSION],
) -> EvalRows:
    """Render and tokenize general prompts or test rows, without adding the system message of the training rows.

    Args:
        records: The rows, as `read_records` returns them; at least one.
        section: Section `evaluate.regression` of params.yaml. Without a task, the result has rows but no prompts.
        tokenizer: The run's tokenizer with its chat template.
        root: The checkout, for the user's tasks.
        key: Its key in params.yaml, for messages.

    Raises:
        ValueError: The template refuses a row, or the task can't score against an answer; names the row.
    """
    # imported here, as `python -m stages check` only reads the rows and need not wait for transformers
    from sft.chat.render import ChatRenderer
    from sft.tokens.encoding import encode_batch

    renderer = ChatRenderer(tokenizer)
    rows = [dict(row) for row in encode_batch([renderer.render(record) for record in records], tokenizer)]
    if section.task is None:
        return EvalRows(rows, [], [], Task(()), section.max_new_tokens)
    task = load_tasks(section.task, root)
    turns = [(record["id"], renderer.last_turn(record)) for record in records]
    prompts = [{"id": name, **turn._asdict()} for name, turn in turns if turn is not None]
    check_references(prompts, task, f"{key.removesuffix('.path')}.task", "row")
    return EvalRows.of(rows, prompts, tokenizer, task, section.max_new_tokens)
