"""One training at a time on a device, whoever starts it: a flow, `dvc repro` in a shell, another checkout.

The lock is a file that the kernel unlocks when its holder ends, however that happens. It is held by the process that
trains, for the time of the training, so that every way of starting one meets it.

Who has a device: the locks of this machine's trainings, and what their holders say of themselves.
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


BUSY_VARIABLE = "SFT_WHEN_BUSY"

WAIT, REFUSE = "wait", "refuse"

POLL_S = 0.2

REMIND_S = 60.0


@contextmanager
def sole_training(root: Path) -> Iterator[None]:
    """Hold the devices that a training of this process uses, for the time of the block.

    What happens while another training has one of them is said by the environment variable SFT_WHEN_BUSY: `wait` (the
    default) or `refuse`.

    Args:
        root: The checkout, named to those who find the device taken.

    Raises:
        ValueError: A device is taken and SFT_WHEN_BUSY is `refuse`, or it has another value.
    """
    when_busy = os.environ.get(BUSY_VARIABLE, WAIT)
    if when_busy not in (WAIT, REFUSE):
        raise ValueError(f"{BUSY_VARIABLE}={when_busy!r}: it is `{WAIT}` or `{REFUSE}`")
    folder = lock_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        # everybody takes them in the same order, or two trainings could wait for each other
        for device in sorted(devices_used(visible_gpus(), os.environ.get("LOCAL_RANK"))):
            held.enter_context(_one_device(folder, device, root, when_busy))
        yield


def visible_gpus() -> list[str]:
    """Identities of the GPUs that this process may use: the same for every process."""
    import torch  # the stage is about to import it anyway; other users of this module need not

    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def devices_used(gpus: list[str], local_rank: str | None) -> list[str]:
    """Names of the devices that one process of a training occupies.

    Args:
        gpus: Those that it sees.
        local_rank: Its number among the processes of this machine when there are several, which share the GPUs; without
            GPUs they share the processor, and the first one holds it for all.
    """
    if local_rank is None:
        return [f"gpu-{gpu}" for gpu in gpus] or ["cpu"]
    if gpus:
        return [f"gpu-{gpus[int(local_rank) % len(gpus)]}"]
    return ["cpu"] if local_rank == "0" else []


@contextmanager
def _one_device(folder: Path, device: str, root: Path, when_busy: str) -> Iterator[None]:
    name = re.sub(r"[^\w-]", "_", device)
    holder_file = folder / f"{name}{HOLDER_SUFFIX}"
    # others who share the folder must be able to open the file, too
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
            f"{describe_holder(device, holder_file)}. Wait until it ends, or let this one wait: {BUSY_VARIABLE}={WAIT}"
        )
    while True:
        print(f"waiting: {describe_holder(device, holder_file)}; not to wait: {BUSY_VARIABLE}={REFUSE}", flush=True)
        try:
            lock.acquire(timeout=REMIND_S)
            return
        except Timeout:
            continue
