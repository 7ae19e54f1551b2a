"""Who has a device: the locks of this machine's trainings, and what their holders say of themselves."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from stages.models.base import cache_folder

FOLDER_VARIABLE = "SFT_LOCK_DIR"
HOLDER_SUFFIX = ".holder.json"


def lock_folder() -> Path:
    """Where the locks of this machine lie: $SFT_LOCK_DIR, for several users of one machine, else the user's own cache.

    A home folder may be that of many machines, so the machine's name is part of the path.
    """
    return Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "locks") / socket.gethostname()


def trainings_at_work() -> list[Path]:
    """The checkouts, or their worktrees, in which something trains on this machine just now."""
    holders = (read_holder(file) for file in sorted(lock_folder().glob(f"*{HOLDER_SUFFIX}")))
    return [Path(holder["folder"]) for holder in holders if holder is not None]


def describe_holder(device: str, holder_file: Path) -> str:
    """Who has a device: process, folder, since when."""
    what = "the processor of this machine" if device == "cpu" else device.replace("gpu-", "GPU ", 1)
    holder = read_holder(holder_file)
    if holder is None:  # written a moment after the lock is taken
        return f"another training has {what}; it has just begun"
    since = datetime.fromtimestamp(holder["since"])
    minutes = (time.time() - holder["since"]) / 60
    return (
        f"another training has {what}: process {holder['pid']} in {holder['folder']}, "
        f"since {since:%Y-%m-%d %H:%M:%S} ({minutes:.0f} min)"
    )


def read_holder(file: Path) -> dict[str, Any] | None:
    """What the holder of a device says of itself; None where there is none, or one that is gone."""
    try:
        holder: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder if psutil.pid_exists(holder["pid"]) else None
