"""The base model's recorded tokens, matched with the packed rows that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors.torch import load_file

from sft.labels import TEACHER_ROWS
from sft.loss.teacher import Teacher
from stages.loading.rehearsed import RECORDED, read_summary

Integers = np.ndarray[Any, Any]


def with_teacher(rows: Dataset, folder: Path) -> tuple[Dataset, Teacher | None]:
    """Add the column of recorded distributions to packed rows, for the documents that were recorded.

    A document is matched by its token ids, so that one which a template or a length limit has changed is trained on its
    tokens alone.

    Args:
        rows: Packed rows with `seq_lengths`, or rows of one document.
        folder: outs/load/rehearsal.

    Returns:
        The rows and what the column refers to; the rows as they are and None if nothing is recorded or asked for.
    """
    file, weight = folder / RECORDED, read_summary(folder)["kl"]
    if not weight or not file.is_file():
        return rows, None
    recorded = load_file(file)
    ids, places = recorded["ids"].numpy(), recorded["rows"].numpy()
    ends = np.cumsum(recorded["lengths"].numpy())
    known = {
        ids[end - length : end].tobytes(): places[end - length : end]
        for end, length in zip(ends.tolist(), recorded["lengths"].tolist(), strict=True)
    }
    column, num_matched = [], 0
    for row in rows.select_columns([name for name in ("input_ids", "seq_lengths") if name in rows.column_names]):
        found, num_found = _places_of(row, known)
        column.append(found)
        num_matched += num_found
    print(f"rehearsal: {num_matched} documents are trained towards the base model's recorded tokens", flush=True)
    if not num_matched:
        return rows, None
    teacher = Teacher(recorded["tokens"], recorded["probabilities"], weight)
    return rows.add_column(TEACHER_ROWS, column), teacher


def _places_of(row: dict[str, Any], known: dict[bytes, Integers]) -> tuple[list[int], int]:
    """Return the number of each token's distribution in a packed row, and how many of its documents were recorded."""
    tokens = np.asarray(row["input_ids"], dtype=np.int32)
    found, start, count = np.full(len(tokens), -1), 0, 0
    for length in row.get("seq_lengths") or [len(tokens)]:
        places = known.get(tokens[start : start + length].tobytes())
        if places is not None:
            found[start : start + length] = places
            count += 1
        start += length
    return found.tolist(), count
