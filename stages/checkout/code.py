"""The code that computes results: where it lies, the files that come with it, and a digest of what each stage uses.

In a checkout of the repository, dvc.yaml lists the code of each stage. In a project that uses the installed package,
the same list decides what `.sft/code/STAGE.json` holds: the SHA-256 of each of these files. Its dvc.yaml depends on
that file, so that a new version of the package re-runs exactly the stages whose code differs. The stage `code`, which
DVC runs each time, writes the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.checkout.artifacts import file_digest, write_json

PACKAGE = "sft-pipeline"
"""Name of the package on the index."""

CODE = Path(__file__).resolve().parents[2]
"""Folder of the packages sft, stages and flows: a checkout, or site-packages."""

FLOORS = ("sft/", "stages/", "flows/")

DIGESTS = ".sft/code"
"""Folder of a project with the digests."""

STAGE = "code"
"""Stage of a project's dvc.yaml that writes the digests."""

_BUNDLED = CODE / "stages" / "project" / "files"


def shipped(name: str) -> Path:
    """Return a file or folder that comes with the code, such as dvc.yaml, data or recipes.

    Args:
        name: Its path in the repository.
    """
    return (_BUNDLED if _BUNDLED.is_dir() else CODE) / name


def has_own_code(root: Path) -> bool:
    """Return whether a folder is a checkout of the repository, which runs its own code and not the installed one."""
    return (root / "stages" / "__main__.py").is_file()


def code_files(dvc_yaml: Mapping[str, Any], stage: str, code: Path = CODE) -> dict[str, Path]:
    """Return the files of code that a stage depends on.

    Args:
        dvc_yaml: The repository's dvc.yaml.
        stage: Name of the stage.
        code: Folder of the packages.

    Returns:
        Path relative to `code` -> file, sorted.
    """
    listed = [dep for dep in dvc_yaml["stages"][stage]["deps"] if dep.startswith(FLOORS)]
    found = {path.relative_to(code).as_posix(): path for dep in listed for path in _files(code / dep)}
    return dict(sorted(found.items()))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in path.rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            yield file


def code_digests(stage: str, code: Path = CODE) -> dict[str, str]:
    """Return path -> SHA-256 of the files of code that a stage depends on."""
    dvc_yaml = _read(shipped("dvc.yaml"))
    return {name: file_digest(path) for name, path in code_files(dvc_yaml, stage, code).items()}


def write_code_digests(root: Path) -> list[str]:
    """Write the digests that a project's dvc.yaml depends on; none in a checkout of the repository.

    Args:
        root: The project.

    Returns:
        The stages whose code differs from what was written before.
    """
    if has_own_code(root) or not (root / "dvc.yaml").is_file():
        return []
    known, changed = _read(shipped("dvc.yaml"))["stages"], []
    for name, stage in (_read(root / "dvc.yaml").get("stages") or {}).items():
        file = root / DIGESTS / f"{name}.json"
        if name not in known or file.relative_to(root).as_posix() not in (stage.get("deps") or []):
            continue
        digests = code_digests(name)
        if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != digests:
            write_json(file, digests)
            changed.append(name)
    return changed


def code_version(root: Path) -> str | None:
    """Return version and digest of the installed package that runs a project; None in a checkout, where git knows."""
    if has_own_code(root):
        return None
    try:
        number = version(PACKAGE)
    except PackageNotFoundError:
        number = "unknown"
    total = hashlib.sha256()
    for stage in _read(shipped("dvc.yaml"))["stages"]:
        total.update(json.dumps(code_digests(stage)).encode())
    return f"{number} (code {total.hexdigest()[:12]})"


def _read(path: Path) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {})
