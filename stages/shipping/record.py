"""The record of a shipped folder: what it was made of, by which code, and all that a repetition needs but the data."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.checkout.artifacts import read_json, read_jsonl, write_json, write_text
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.params.schema import Params
from stages.shipping.code_archive import ARCHIVE, write_archive
from stages.shipping.manifest import describe_invalid, read_foreign
from stages.tracking import lineage
from stages.tracking.result import figures

FOLDER = "provenance"
RECORD, PARAMS, LOCK, PATCH = "record.json", "params.yaml", "dvc.lock", "uncommitted.patch"

LEDGERS = ("load", "format", "pack")
"""Stages whose ledgers the record counts."""

WITHOUT_DATA = ("data/",)

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of a record that came from elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Base(Part):
    """The base model, as `load` recorded it."""

    name_or_path: str
    revision: str | None
    resolved: str
    digest: str


class Source(Part):
    """A source of rows.

    Args:
        purpose: `train` or `eval`.
        path: File or folder below data/, URL, or id on the hub.
        is_local: Whether it is read from data/, so that whoever repeats the run needs the files.
        num_rows: Number of its rows.
        columns: Columns that were read.
        files: Path below data/, or URL -> SHA-256; empty for a data set on the hub.
        sizes: Path below data/ -> bytes, of the files that were there when the record was written.
    """

    purpose: str
    path: str
    is_local: bool
    num_rows: int
    columns: list[str]
    files: dict[str, Digest]
    sizes: dict[str, int]


class Code(Part):
    """The code that computed the result.

    Args:
        commit: Hash of the commit.
        date: Date of the commit, ISO 8601.
        changed: Tracked files that differed from it.
        patch_redacted: Whether the recorded patch lacks secrets that the changes contained.
    """

    commit: Annotated[str, Field(pattern="^[0-9a-f]{7,64}$")]
    date: str
    changed: list[str]
    patch_redacted: bool


class Record(Part):
    """What is known of a shipped model.

    Args:
        name: Name of the registered model.
        model: Which model of the result it is: `merged` or `quantized`.
        result_digest: Digest of params and results, by which its run is found in MLflow.
        base_model: The base model.
        sources: The sources of rows.
        num_train: Number of training rows.
        num_eval: Number of held-out rows.
        ledger: "stage: action reason" -> number of rows.
        code: The code; None if the checkout was not in git.
        versions: Package -> version.
        machine: What else decides the last digits.
        gate_passed: Whether the conditions of `evaluate.gate` were met.
        figures: `<stage>.<metric>` -> value.
    """

    format: Literal[1] = 1
    name: str
    model: str
    result_digest: str
    base_model: Base
    sources: list[Source]
    num_train: int
    num_eval: int
    ledger: dict[str, int]
    code: Code | None
    versions: dict[str, str]
    machine: dict[str, str]
    gate_passed: bool
    figures: dict[str, float]

    def local_files(self) -> dict[str, str]:
        """Return path below data/ -> SHA-256 of the files that a repetition needs."""
        return {name: digest for source in self.sources if source.is_local for name, digest in source.files.items()}


def make_record(params: Params, paths: Paths, shipped: str, digest: str) -> Record:
    """Return the record of the result in a checkout; it holds nothing that the clock decides.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
        shipped: The model that is shipped.
        digest: Digest of the result.
    """
    card = read_json(paths.out("load", "card.json"))
    record = Record(
        name=params.publish.registered_model,
        model=shipped,
        result_digest=digest,
        base_model=Base(**lineage.base_model(paths)),
        sources=[_source(source, paths) for source in card["sources"]],
        num_train=card["num_train"],
        num_eval=card["num_eval"],
        ledger=count_ledgers(paths),
        code=_code(paths.root),
        versions=lineage.versions(paths.root),
        machine=lineage.machine_facts(),
        gate_passed=read_json(paths.out("evaluate", "results.json"))["passed"],
        figures=figures(paths),
    )
    return Record.model_validate_json(redact(record.model_dump_json()))


def write_record(folder: Path, record: Record, params: Params, root: Path) -> None:
    """Write the record and the files that a repetition needs into a shipped folder, without secrets and without data.

    Args:
        folder: The shipped folder.
        record: The record.
        params: Values of params.yaml; `publish.ship_code` states whether the code is shipped, too.
        root: The checkout.
    """
    place = folder / FOLDER
    write_json(place / RECORD, record.model_dump())
    for name in (PARAMS, LOCK, "requirements.lock"):
        if (root / name).is_file():
            write_text(place / name, redact((root / name).read_text(encoding="utf-8")))
    if record.code is None:
        return
    if record.code.changed:
        write_text(place / PATCH, redact(lineage.git_diff(root, WITHOUT_DATA)))
    if params.publish.ship_code:
        write_archive(place / ARCHIVE, root, frozenset(record.code.changed))


def read_record(folder: Path) -> Record:
    """Read the record of a folder from elsewhere.

    Raises:
        ValueError: There is none, or it can't be read.
    """
    text = read_foreign(folder, f"{FOLDER}/{RECORD}")
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{folder / FOLDER / RECORD} can't be read: {describe_invalid(error)}") from None


def obstacles(folder: Path, record: Record) -> list[str]:
    """Return what a folder lacks for a repetition, besides the data and the base model."""
    place = folder / FOLDER
    lacking = [name for name in (PARAMS, LOCK) if not (place / name).is_file()]
    if record.code is None:
        lacking.append("a git commit")
    elif record.code.changed and not (place / PATCH).is_file():
        lacking.append(PATCH)
    return lacking


def count_ledgers(paths: Paths) -> dict[str, int]:
    """Return "stage: action reason" -> number of entries in the ledgers."""
    counts = Counter(
        f"{entry['stage']}: {entry['action']} {entry['reason']}"
        for stage in LEDGERS
        if (file := paths.out(stage, "ledger.jsonl")).is_file()
        for entry in read_jsonl(file)
    )
    return dict(sorted(counts.items()))


def _source(card: dict[str, Any], paths: Paths) -> Source:
    place = Path(os.path.normpath(paths.root / card["path"]))
    is_local = not card.get("hub") and place.is_relative_to(paths.data)
    places = {name: paths.data / name for name in card["sha256"]} if is_local else {}
    return Source(
        purpose=card["purpose"],
        path=card["path"],
        is_local=is_local,
        num_rows=card["num_rows"],
        columns=card.get("columns", []),
        files=card["sha256"],
        sizes={name: file.stat().st_size for name, file in places.items() if file.is_file()},
    )


def _code(root: Path) -> Code | None:
    git = lineage.git_state(root)
    if git is None:
        return None
    dated = subprocess.run(
        ["git", "-C", str(root), "show", "-s", "--format=%cI", git.commit], capture_output=True, text=True, check=True
    ).stdout.strip()
    patch = lineage.git_diff(root, WITHOUT_DATA)
    changed = [name for name in git.changed if not name.startswith(WITHOUT_DATA)]
    return Code(commit=git.commit, date=dated, changed=changed, patch_redacted=redact(patch) != patch)
