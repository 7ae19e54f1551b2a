"""Names and files of the rehearsal that later stages read; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from stages.checkout.artifacts import read_json, write_json
from stages.params.schema import RehearsalSection

SOURCE = "rehearsal"
"""Name of the rows' source in row ids, ledgers and reports."""

ROWS, RECORDED, SUMMARY = "rows.jsonl", "recorded.safetensors", "summary.json"
"""Files in outs/load/rehearsal: the rows, the recorded tokens, and what `pack` and `train` need of params.yaml."""


def is_rehearsed(row_id: str) -> bool:
    """Return whether a row is one of the rehearsal, by its id."""
    return row_id.startswith(f"{SOURCE}:")


def write_summary(folder: Path, section: RehearsalSection | None) -> None:
    """Write what later stages need to know of the section; share and kl are 0 without a rehearsal."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"share": 0.0, "kl": 0.0} if section is None else section.model_dump(include={"share", "kl"})
    write_json(folder / SUMMARY, values)


def read_summary(folder: Path) -> dict[str, float]:
    """Return the share of the trained tokens and the weight of the divergence; 0 where an older `load` wrote none."""
    file = folder / SUMMARY
    found: dict[str, float] = read_json(file) if file.is_file() else {"share": 0.0, "kl": 0.0}
    return found
