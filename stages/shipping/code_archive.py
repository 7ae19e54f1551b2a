"""The code of a result as one archive: the tracked files of a checkout without its data, byte for byte repeatable."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from pathlib import Path

from stages.checkout.redaction import redact

ARCHIVE = "code.tar.gz"

LEFT_OUT = ("data/", "reports/", ".dvc/", "dvc.lock")
"""Tracked files that are not code: the data, what runs write, and DVC's settings, which may name a remote."""

ALWAYS_REDACTED = ("params.yaml",)

MAX_UNPACKED_BYTES = 2**30


def write_archive(file: Path, root: Path, changed: frozenset[str]) -> None:
    """Write the tracked files as they are in a checkout, uncommitted changes included.

    Names are sorted, and owners and times are left out, so that the same files give the same bytes.

    Args:
        file: Archive to write.
        root: The checkout.
        changed: Files that differ from the commit; secrets in them are replaced.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
    names = sorted(name for name in listed.decode("utf-8", "surrogateescape").split("\0") if name)
    with (
        file.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in names:
            place = root / name
            if name.startswith(LEFT_OUT) or name.endswith(".dvc") or not place.is_file():
                continue
            content = place.read_bytes()
            if name in changed or name in ALWAYS_REDACTED:
                content = _redacted(content)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if place.stat().st_mode & 0o100 else 0o644
            archive.addfile(entry, io.BytesIO(content))


def unpack_archive(file: Path, folder: Path) -> None:
    """Write the files of an archive from elsewhere into a folder, none of them outside of it.

    Raises:
        ValueError: It is damaged, too large, or holds something other than files below the folder.
    """
    try:
        with tarfile.open(file, mode="r:gz") as archive:
            total = 0
            for entry in archive:
                total += entry.size
                if not entry.isreg() or total > MAX_UNPACKED_BYTES:
                    raise ValueError(
                        f"{file}: it holds more than files, or unpacks to over {MAX_UNPACKED_BYTES:,} bytes"
                    )
                archive.extract(entry, folder, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} can't be unpacked: {error!r:.200}") from None


def _redacted(content: bytes) -> bytes:
    """Return a text file without secrets; a file that is not text is returned as it is."""
    try:
        return redact(content.decode("utf-8")).encode("utf-8")
    except UnicodeDecodeError:
        return content
