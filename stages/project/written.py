"""Which files of a project the package wrote, so that `sft upgrade` replaces those alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from stages.checkout.artifacts import read_json, write_json

WRITTEN = ".sft/project.json"
"""File of a project with the SHA-256 of each file as the package wrote it, to tell which ones its owner changed."""

NEW = ".sft/new"
"""Folder for new versions of files that the owner changed."""

OWN = ("params.yaml", "data/", "tasks/", ".dvc/config", ".dvc/.gitignore")
"""Files that belong to the owner from the beginning."""


def managed_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return those of a project's files that the package may replace."""
    return {name: content for name, content in files.items() if not name.startswith(OWN)}


def note_written(root: Path, files: Mapping[str, bytes]) -> None:
    """Note the digests of files that the package wrote, beside those noted before."""
    written = {name: digest(content) for name, content in managed_files(files).items()}
    write_json(root / WRITTEN, {**noted_digests(root), **written})


def noted_digests(root: Path) -> dict[str, str]:
    """Return name -> digest of the files that the package wrote."""
    record = root / WRITTEN
    return read_json(record) if record.is_file() else {}


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()
