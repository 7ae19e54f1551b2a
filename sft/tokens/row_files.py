"""Rows written to a folder that `datasets.load_from_disk` opens, as they come: no more than a table is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable

from sft.tokens.columns import hash_table

MAX_FILE_BYTES = 500 << 20


def write_rows(tables: Iterator[pa.Table], folder: Path) -> None:
    """Write tables of one schema as one data set, whose fingerprint depends on their content alone.

    Args:
        tables: One or more tables.
        folder: Made new.
    """
    first = next(tables)
    schema = Features.from_arrow_schema(first.schema).arrow_schema
    hasher = Hasher()
    folder.mkdir(parents=True)
    names: list[str] = []
    table: pa.Table | None = hash_table(first, hasher)
    while table is not None:
        name, num_bytes = f"part-{len(names):05d}.arrow", 0
        names.append(name)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while table is not None and (num_bytes == 0 or num_bytes + table.nbytes <= MAX_FILE_BYTES):
                writer.write_table(table.cast(schema))
                num_bytes += table.nbytes
                following = next(tables, None)
                table = None if following is None else hash_table(following, hasher)
    _describe(folder, names, schema, hasher.hexdigest())


def _describe(folder: Path, names: list[str], schema: pa.Schema, fingerprint: str) -> None:
    """Let `datasets` write its own description, of no rows, and put our files into it."""
    Dataset(InMemoryTable(schema.empty_table()), fingerprint=fingerprint).save_to_disk(str(folder / "empty"))
    state = json.loads((folder / "empty" / "state.json").read_text(encoding="utf-8"))
    final = [f"data-{number:05d}-of-{len(names):05d}.arrow" for number in range(len(names))]
    state["_data_files"] = [{"filename": name} for name in final]
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "empty" / "dataset_info.json").replace(folder / "dataset_info.json")
    for name, better in zip(names, final, strict=True):
        (folder / name).replace(folder / better)
    for path in (folder / "empty").iterdir():
        path.unlink()
    (folder / "empty").rmdir()
