"""Errors of a full disk: recognised whoever raised them, and said in one message."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL_BYTES = 1_000_000
"""A disk with less than this is full: whoever could not write has filled it up to the last block."""

FULL = ("No space left on device", "database or disk is full")
"""What tokenizers and safetensors say, and SQLite."""


def is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether an error means that there is no space left: Python's own, tokenizers', safetensors', SQLite's or torch's.

    Args:
        error: What was raised.
        folder: Where it was being written; looked at when the error itself does not say what happened.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(text in str(error) for text in FULL):
        return True
    # torch.save only says that its stream broke
    return "inline_container.cc" in str(error) and shutil.disk_usage(folder).free < FULL_BYTES


def explain_full_disk(error: BaseException, stage: str, root: Path) -> ValueError:
    """What a user is told, whatever library raised the error."""
    file = getattr(error, "filename", None)
    return ValueError(
        f"no space left on the disk: `{stage}` could not write {file or f'all of its results below {root}'}; what was "
        "there before is as it was. Free some space (also where temporary files and caches lie) and type the command "
        "again"
    )
