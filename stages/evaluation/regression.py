"""General prompts, which a training must not make worse: a file in tasks/, rendered with the run's template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.records import RowError, detect_layout, normalize, validate_record
from sft.data.sources import data_files, read_rows
from sft.evaluate.tasks import Task
from stages.evaluation.rows import EvalRows, check_references
from stages.params.evaluate_params import RegressionSection
from stages.params.tasks import load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
