"""What a shipped folder is: which of its files differ from its manifest, what it was made of, whether it is signed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import file_digest
from stages.checkout.foreign_text import for_terminal
from stages.shipping.code_archive import ARCHIVE
from stages.shipping.manifest import MANIFEST, SIGNATURE, FileVerdict, compare_with_manifest, read_manifest
from stages.shipping.record import FOLDER, Record, obstacles, read_record
from stages.shipping.signature import check_signature

MAX_SHOWN = 10


@dataclass(frozen=True)
class Inspection:
    """What is known of a shipped folder.

    Args:
        folder: The folder.
        num_files: Number of files in its manifest.
        manifest_sha256: Digest of the manifest.
        wrong: Files that are not as the manifest lists them.
        signature: none, unchecked, valid or invalid.
        signature_problem: Why it is invalid.
        record: What the folder says of its origin; None if that can't be read.
        problem: Why it can't be read.
        lacking: What is missing for a repetition besides data and base model.
        has_code: Whether the folder holds the code.
    """

    folder: Path
    num_files: int
    manifest_sha256: str
    wrong: list[FileVerdict]
    signature: str
    signature_problem: str
    record: Record | None
    problem: str
    lacking: list[str]
    has_code: bool

    @property
    def is_sound(self) -> bool:
        """Whether every file is as it was written, and the signature holds if a key was named."""
        return not self.wrong and not self.problem and self.signature != "invalid"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "same": self.is_sound,
            "manifest_sha256": self.manifest_sha256,
            "wrong": [asdict(verdict) for verdict in self.wrong],
            "signature": self.signature,
            "signature_problem": self.signature_problem,
            "record": None if self.record is None else self.record.model_dump(),
            "problem": self.problem,
            "can_be_repeated": self.record is not None and not self.lacking,
            "lacking": self.lacking,
        }

    def lines(self) -> list[str]:
        """Return all of it as text for a terminal."""
        lines = [f"  {verdict.state:<9}{verdict.path}  ({verdict.detail})" for verdict in self.wrong]
        if not self.wrong:
            lines.append(f"  all {self.num_files} files are as {MANIFEST} lists them")
        else:
            lines.append(f"  {len(self.wrong)} files are not as {MANIFEST} lists them")
        lines += [f"  {self._describe_signature()}", f"  {MANIFEST}: SHA-256 {self.manifest_sha256}"]
        if self.record is None:
            lines.append(f"  {self.problem}")
        else:
            lines += ["", *(f"  {line}" for line in describe_record(self.record, self.has_code))]
            lines.append(f"  {self._describe_repetition(self.record)}")
        return [for_terminal(line) for line in lines]

    def _describe_signature(self) -> str:
        if self.signature == "none":
            return f"not signed: whoever can change a file here can change {MANIFEST}, too; compare its digest below"
        if self.signature == "unchecked":
            return f"{SIGNATURE} was not checked; name the signer's public key: --key FILE"
        return "signature: valid" if self.signature == "valid" else f"signature: invalid: {self.signature_problem}"

    def _describe_repetition(self, record: Record) -> str:
        if self.lacking:
            return f"can't be repeated: it was recorded without {', '.join(self.lacking)}"
        needs = ["--data FOLDER"] if record.local_files() else []
        where = "" if self.has_code else " in a checkout that has the commit"
        return f"can be repeated{where}: {' '.join(['sft reproduce', str(self.folder), *needs])}"


def inspect_folder(folder: Path, key: Path | None = None) -> Inspection:
    """Compare a folder with its manifest and its signature, and read its record.

    Args:
        folder: A shipped folder, from anywhere.
        key: Public key that it must be signed with; None = the signature is not checked.

    Raises:
        ValueError: The folder has no manifest, or the key can't be used.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    manifest = read_manifest(folder)
    signature, why = "unchecked" if (folder / SIGNATURE).is_file() else "none", ""
    if key is not None:
        why = check_signature(folder, key)
        signature = "invalid" if why else "valid"
    record, problem = None, ""
    try:
        record = read_record(folder)
    except ValueError as error:
        problem = str(error)
    return Inspection(
        folder=folder,
        num_files=len(manifest.files),
        manifest_sha256=file_digest(folder / MANIFEST),
        wrong=compare_with_manifest(folder),
        signature=signature,
        signature_problem=why,
        record=record,
        problem=problem,
        lacking=[] if record is None else obstacles(folder, record),
        has_code=(folder / FOLDER / ARCHIVE).is_file(),
    )


def describe_record(record: Record, has_code: bool) -> list[str]:
    """Return the origin of a model in lines: data, base model, code, versions."""
    lines = [f"{record.name}: the {record.model} model of result {record.result_digest[:12]}"]
    for source in record.sources:
        purpose = "trained on" if source.purpose == "train" else "measured on"
        digests = [f"{name} (SHA-256 {digest[:12]})" for name, digest in list(source.files.items())[:MAX_SHOWN]]
        more = f" and {len(source.files) - MAX_SHOWN} more files" if len(source.files) > MAX_SHOWN else ""
        lines.append(f"{purpose}: {', '.join(digests) or source.path}{more}, {source.num_rows:,} rows")
    lines += [f"rows: {what}: {number:,}" for what, number in record.ledger.items()]
    base = record.base_model
    lines.append(f"base model: {base.name_or_path} ({base.resolved}, SHA-256 {base.digest[:12]})")
    if record.code is None:
        lines.append("code: not in git")
    else:
        changed = f" with uncommitted changes to {', '.join(record.code.changed)}" if record.code.changed else ""
        copy = f"; a copy is in {FOLDER}/{ARCHIVE}" if has_code else ""
        lines.append(f"code: commit {record.code.commit} of {record.code.date}{changed}{copy}")
    versions = ", ".join(
        f"{name} {record.versions[name]}" for name in ("python", "torch", "transformers") if name in record.versions
    )
    return [*lines, f"versions: {versions}", f"gate: {'passed' if record.gate_passed else 'failed'}"]
