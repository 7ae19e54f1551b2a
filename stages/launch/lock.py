"""Lock that lets one training at a time use a device, whether a flow, `dvc repro` or another checkout started it.

Each device has a lock file, which the kernel unlocks when the process that trains ends, even if it is killed. Next to
it, a second file names that process and its folder.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from stages.checkout.artifacts import write_json
from stages.checkout.paths import cache_folder

FOLDER_VARIABLE = "SFT_LOCK_DIR"

HOLDER_SUFFIX = ".holder.json"

BUSY_VARIABLE = "SFT_WHEN_BUSY"

WAIT, REFUSE = "wait", "refuse"

POLL_S = 0.2

REMIND_S = 60.0


@contextmanager
def sole_training(root: Path) -> Iterator[None]:
    """Lock the devices that a training of this process uses, until the block ends.

    If another training uses one of them, the environment variable SFT_WHEN_BUSY decides: `wait` (the default) or
    `refuse`.

    Args:
        root: The checkout, which the messages of other trainings name.

    Raises:
        ValueError: A device is taken and SFT_WHEN_BUSY is `refuse`, or it has another value.
    """
    when_busy = os.environ.get(BUSY_VARIABLE, WAIT)
    if when_busy not in (WAIT, REFUSE):
        raise ValueError(f"{BUSY_VARIABLE}={when_busy!r}: it must be `{WAIT}` or `{REFUSE}`")
    folder = lock_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        # in the same order in every process, or two trainings could wait for each other
        ranks = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        for device in sorted(devices_used(visible_gpus(), *ranks)):
            locks.enter_context(_one_device(folder, device, root, when_busy))
        yield


def lock_folder() -> Path:
    """Return the folder of this machine's locks: below $SFT_LOCK_DIR, which users may share, or the user's cache.

    The machine's name is part of the path, since several machines may share a home folder.
    """
    return Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "locks") / socket.gethostname()


def visible_gpus() -> list[str]:
    """Return the identifiers of the GPUs that this process may use; they are the same in every process."""
    import torch  # slow, and only trainings need it

    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def devices_used(gpus: list[str], local_rank: str | None, local_world_size: str | None) -> list[str]:
    """Return the names of the devices that one process of a training locks.

    Args:
        gpus: Identifiers of the GPUs that it may use.
        local_rank: Its number among the processes on this machine; None for a single process, which uses all GPUs.
            The first process locks the devices of all, so that two trainings never wait for each other.
        local_world_size: Number of processes on this machine; None = one per GPU.
    """
    if local_rank not in (None, "0"):
        return []
    if local_rank is not None and local_world_size is not None:
        gpus = gpus[: int(local_world_size)]
    return [f"gpu-{gpu}" for gpu in gpus] or ["cpu"]


def trainings_at_work() -> list[Path]:
    """Return the checkouts and worktrees in which a training runs on this machine."""
    holders = (read_holder(file) for file in sorted(lock_folder().glob(f"*{HOLDER_SUFFIX}")))
    return [Path(holder["folder"]) for holder in holders if holder is not None]


def read_holder(file: Path) -> dict[str, Any] | None:
    """Read which process uses a device: its `pid`, `folder` and start (`since`, seconds since 1970).

    Returns:
        None if there is no such file, it is incomplete, or the process has ended.
    """
    try:
        holder: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder if psutil.pid_exists(holder["pid"]) else None


def describe_holder(device: str, holder_file: Path) -> str:
    """Describe the training that uses a device: process, folder and start.

    Args:
        device: Name of the device, one of `devices_used`.
        holder_file: File that the training wrote next to its lock.
    """
    what = "the processor of this machine" if device == "cpu" else device.replace("gpu-", "GPU ", 1)
    holder = read_holder(holder_file)
    if holder is None:  # the file is written a moment after the lock is taken
        return f"another training uses {what}; it has just begun"
    since = datetime.fromtimestamp(holder["since"])
    minutes = (time.time() - holder["since"]) / 60
    return (
        f"another training uses {what}: process {holder['pid']} in {holder['folder']}, "
        f"since {since:%Y-%m-%d %H:%M:%S} ({minutes:.0f} min)"
    )


@contextmanager
def _one_device(folder: Path, device: str, root: Path, when_busy: str) -> Iterator[None]:
    name = re.sub(r"[^\w-]", "_", device)
    holder_file = folder / f"{name}{HOLDER_SUFFIX}"
    # other users of a shared folder must be able to open the file, too
    lock = FileLock(folder / f"{name}.lock", mode=0o666, poll_interval=POLL_S)
    _acquire(lock, device, holder_file, when_busy)
    try:
        write_json(holder_file, {"pid": os.getpid(), "folder": str(root), "since": time.time()})
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, device: str, holder_file: Path, when_busy: str) -> None:
    try:
        lock.acquire(blocking=False)
        return
    except Timeout:
        pass
    if when_busy == REFUSE:
        raise ValueError(
            f"{describe_holder(device, holder_file)}. Wait until it ends, or let this training wait: "
            f"{BUSY_VARIABLE}={WAIT}"
        )
    while True:
        print(
            f"waiting: {describe_holder(device, holder_file)}; to stop instead of waiting, set "
            f"{BUSY_VARIABLE}={REFUSE}",
            flush=True,
        )
        try:
            lock.acquire(timeout=REMIND_S)
            return
        except Timeout:
            continue
