"""Detection of errors caused by a full disk, and the message that explains them."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL_BYTES = 1_000_000
"""A disk with less free space than this counts as full: a failed write has filled all but the last block."""

FULL = ("No space left on device", "database or disk is full")
"""Messages of tokenizers and safetensors, and of SQLite."""


def is_full_disk(error: BaseException, folder: Path) -> bool:
    """Return whether an error of Python, tokenizers, safetensors, SQLite or torch means that no space is left.

    Args:
        error: What was raised.
        folder: Folder that was written to; its free space is checked if the error does not state the cause.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(text in str(error) for text in FULL):
        return True
    # torch.save reports only that its stream failed
    return "inline_container.cc" in str(error) and shutil.disk_usage(folder).free < FULL_BYTES


def explain_full_disk(error: BaseException, stage: str, root: Path) -> ValueError:
    """Return the error that explains a full disk to the user.

    Args:
        error: What a library raised.
        stage: Name of the stage that failed.
        root: The checkout.
    """
    file = getattr(error, "filename", None)
    return ValueError(
        f"no space left on the disk: `{stage}` could not write {file or f'all of its results below {root}'}; "
        "earlier results are unchanged. Free some space (also where temporary files and caches lie) and type the "
        "command again"
    )
