"""Rehearsal: rows in which the base model itself answers general prompts, mixed in so that training keeps what it can.

The rows are made before training, without outside data, by the model that is to be trained (self-synthesized rehearsal,
SSR, Huang et al., arXiv:2403.01244). Taken over from there is that the base model writes the rehearsed answers and that
they are mixed with the task's rows. Here the prompts are written by hand instead of by the model, and no answers are
refined or clustered. Optionally the base model's most likely tokens are recorded beside its answers, towards which the
training then draws the model (`sft.loss.teacher`), so that no second model is in memory while training.

Answers and recorded tokens are kept in .state/rehearsal under a digest of all that decides them, so that `load` makes
them once for all its runs.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.data.sources import data_files, read_rows
from sft.folders import replacing_folder
from stages.checkout.artifacts import file_digest, read_jsonl, write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.loading.rehearsed import RECORDED, ROWS, SOURCE, SUMMARY, write_summary
from stages.params.schema import ModelSection, RehearsalSection

KEY = "params.yaml, load.rehearsal.prompts"
BUILTIN = "builtin"
BUILTIN_FILE = Path(__file__).with_name("rehearsal_prompts.jsonl")

PROMPT_COLUMNS = ("prompt", "question", "instruction", "text")
"""Columns that a row's prompt is read from, if it has no `messages`; the first one that it has."""

VERSION = 1
"""Number in the digest of answers; raise it when the way in which they are made changes."""


@dataclass(frozen=True)
class Asked:
    """What the base model is asked.

    Args:
        prompts: Messages of each prompt, in the order in which the rows are used.
        digests: SHA-256 of every file of prompts by its name.
    """

    prompts: list[list[dict[str, str]]]
    digests: dict[str, str]


def read_asked(section: RehearsalSection, paths: Paths) -> Asked:
    """Read the prompts and order them by the seed.

    Raises:
        ValueError: The file is missing or empty, or a row has no prompt; names the row.
    """
    if section.prompts == BUILTIN:
        files = [(BUILTIN_FILE, BUILTIN)]
    else:
        try:
            files = [
                (file, file.relative_to(paths.root).as_posix()) for file in data_files(paths.root / section.prompts)
            ]
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error
    prompts: dict[str, list[dict[str, str]]] = {}
    for file, name in files:
        for row in read_rows(file, name):
            messages = _prompt_of(row.columns)
            if messages is None:
                raise ValueError(
                    f"{KEY}: {row.id} has no prompt: it needs messages with one of the user, or one of the columns "
                    f"{', '.join(PROMPT_COLUMNS)} with a text"
                )
            prompts.setdefault(json.dumps(messages, ensure_ascii=False), messages)
    if not prompts:
        raise ValueError(f"{KEY}: {section.prompts} has no rows; give a file that has some, or {BUILTIN}")
    ordered = list(prompts.values())
    random.Random(section.seed).shuffle(ordered)
    return Asked(ordered, {name: file_digest(file) for file, name in files})


def _prompt_of(columns: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """Return the messages before the answer of a row; None if it has none. Its answer, if any, is not used."""
    messages = columns.get("messages")
    if isinstance(messages, list):
        known = [m for m in messages if isinstance(m, Mapping) and isinstance(m.get("content"), str)]
        last = max((i for i, m in enumerate(known) if m.get("role") == "user"), default=None)
        if last is None or len(known) < len(messages):
            return None
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in known[: last + 1]]
    texts = (columns.get(name) for name in PROMPT_COLUMNS)
    text = next((value for value in texts if isinstance(value, str) and value.strip()), None)
    return None if text is None else [{"role": "user", "content": text}]


def rehearse(
    section: RehearsalSection, model: ModelSection, base: Any, paths: Paths, folder: Path
) -> list[dict[str, Any]]:
    """Write the rehearsal into a folder, answered by the base model or from the cache, and return its rows.

    Args:
        section: The section `load.rehearsal` of params.yaml.
        model: The section `model`.
        base: The base model that was found, with `digest` and `path`.
        paths: The checkout.
        folder: The folder to write.

    Returns:
        The rows: `id`, the records' `prompt` and `completion`, and `unfinished`, why an answer can't be used or None.

    Raises:
        ValueError: There are no prompts, or the base model can't answer.
    """
    asked = read_asked(section, paths)
    settings = {
        "version": VERSION,
        "base": base.digest,
        "dtype": model.dtype,
        "prompts": asked.prompts,
        **section.model_dump(include={"max_new_tokens", "temperature", "seed", "top_k"}),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    kept = paths.state / SOURCE / key
    if not (kept / SUMMARY).is_file():
        from stages.loading.base_answers import answer_prompts  # imports torch

        with replacing_folder(kept) as new:
            rows = answer_prompts(section, model, Path(base.path), asked.prompts, new / RECORDED)
            write_jsonl(new / ROWS, rows)
            write_json(new / SUMMARY, {"num_prompts": len(rows)})
    else:
        print(f"rehearsal: answers of the base model are there already ({kept.relative_to(paths.state.parent)})")
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    write_summary(folder, section)
    return list(read_jsonl(folder / ROWS))


def card(section: RehearsalSection, asked: Asked) -> dict[str, Any]:
    """Return what the data card states of the source."""
    return {
        "path": section.prompts,
        "kind": "prompt_completion",
        "columns": ["prompt", "completion"],
        "unused": [],
        "num_rows": len(asked.prompts),
        "sha256": asked.digests,
        **section.model_dump(exclude={"prompts"}),
    }
