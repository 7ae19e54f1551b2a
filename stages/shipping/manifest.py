"""`manifest.json`: size and SHA-256 of every file of a shipped folder, and the comparison of a folder with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.checkout.artifacts import file_digest, write_json
from stages.checkout.foreign_text import for_terminal

MANIFEST, SIGNATURE = "manifest.json", "model.sig"
NOT_LISTED = (MANIFEST, SIGNATURE)
"""Files that the manifest can't list: itself, and the signature, which is made of all other files."""

NOT_SHIPPED = (".git", ".cache", ".gitattributes")
"""Names that git and the hub's client add at the top of a downloaded folder."""

MAX_BYTES = 64 * 2**20


class FileEntry(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The files of a shipped folder by their path in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class FileVerdict:
    """A file that is not as the manifest lists it.

    Args:
        path: Its path in the folder.
        state: changed, missing or added.
        detail: What differs.
    """

    path: str
    state: str
    detail: str


def write_manifest(folder: Path) -> str:
    """Write the manifest of a folder and return its SHA-256."""
    entries = {
        name: FileEntry(size=size_of(folder / name), sha256=file_digest(folder / name)) for name in files(folder)
    }
    write_json(folder / MANIFEST, Manifest(files=entries).model_dump())
    return file_digest(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder from elsewhere.

    Raises:
        ValueError: There is none, or it can't be read.
    """
    text = read_foreign(folder, MANIFEST)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{folder / MANIFEST} can't be read: {describe_invalid(error)}") from None


def describe_invalid(error: ValidationError) -> str:
    """Return the first problem of a file from elsewhere in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return for_terminal(f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"[:200])


def read_foreign(folder: Path, name: str) -> bytes:
    """Return a small file of a folder from elsewhere.

    Raises:
        ValueError: It is missing or too large.
    """
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{file} is missing: `sft publish` writes it into the folder outs/publish/model")
    if size_of(file) > MAX_BYTES:
        raise ValueError(f"{file} has {size_of(file):,} bytes; it may have {MAX_BYTES:,}")
    return file.read_bytes()


def compare_with_manifest(folder: Path) -> list[FileVerdict]:
    """Return the files that were changed, deleted or added since the manifest was written."""
    listed, present = read_manifest(folder).files, files(folder)
    verdicts = []
    for name in sorted({*listed, *present}):
        if name not in present:
            verdicts.append(FileVerdict(name, "missing", f"{listed[name].size:,} bytes"))
        elif name not in listed:
            verdicts.append(FileVerdict(name, "added", f"{size_of(folder / name):,} bytes"))
        elif (size := size_of(folder / name)) != listed[name].size:
            verdicts.append(FileVerdict(name, "changed", f"{size:,} bytes instead of {listed[name].size:,}"))
        elif not (folder / name).is_file() or file_digest(folder / name) != listed[name].sha256:
            verdicts.append(FileVerdict(name, "changed", "same size, other SHA-256"))
    return verdicts


def files(folder: Path) -> list[str]:
    """Return the paths of the files in a folder that a manifest lists. Links to files count as files."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(
        path.as_posix() for path in found if path.parts[0] not in NOT_SHIPPED and path.as_posix() not in NOT_LISTED
    )


def size_of(file: Path) -> int:
    """Return the number of bytes of a file; of a broken link 0."""
    return file.stat().st_size if file.exists() else 0
