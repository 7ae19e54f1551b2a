"""Lock that lets one training at a time use a device, whether a flow, `dvc repro` or another checkout started it.

Each device has a lock file, which the kernel unlocks when the process that trains ends, even if it is killed. Next to
it, a second file names that process and its folder.

$SFT_LOCK_DIR is a folder of all users (mode 1777, as /tmp). Other users can make any file there, so no file is written
to that this process has not made under a random name, no symbolic link is followed, lock files are opened and never
written, and a file that names a process counts only if the user of that process owns the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from stages.checkout.foreign_text import for_terminal
from stages.checkout.paths import cache_folder

FOLDER_VARIABLE = "SFT_LOCK_DIR"

HOLDER_SUFFIX = ".holder.json"

BUSY_VARIABLE = "SFT_WHEN_BUSY"

WAIT, REFUSE = "wait", "refuse"

POLL_S = 0.2

REMIND_S = 60.0

SHARED_MODE, OWN_MODE = 0o1777, 0o700
"""Modes of the folder: of all users, where only its owner may delete a file, or of this user."""

MAX_HOLDER_BYTES = 16_384

PATIENCE_S = 5.0
"""Seconds after which a lock file that is replaced again and again is an error."""


@contextmanager
def sole_training(root: Path) -> Iterator[None]:
    """Lock the devices that a training of this process uses, until the block ends.

    If another training uses one of them, the environment variable SFT_WHEN_BUSY decides: `wait` (the default) or
    `refuse`.

    Args:
        root: The checkout, which the messages of other trainings name.

    Raises:
        ValueError: A device is taken and SFT_WHEN_BUSY is `refuse`, or it has another value; or the folder of the
            locks can't be used.
    """
    when_busy = os.environ.get(BUSY_VARIABLE, WAIT)
    if when_busy not in (WAIT, REFUSE):
        raise ValueError(f"{BUSY_VARIABLE}={when_busy!r}: it must be `{WAIT}` or `{REFUSE}`")
    folder = make_lock_folder()
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


def make_lock_folder() -> Path:
    """Return `lock_folder`, and make it if it does not exist.

    Raises:
        ValueError: It can't be made or used, or users could delete each other's locks in it.
    """
    folder = lock_folder()
    is_shared = bool(os.environ.get(FOLDER_VARIABLE))
    way_out = f"make a folder for all users: mkdir -p FOLDER && chmod 1777 FOLDER, and set {FOLDER_VARIABLE}=FOLDER"
    try:
        for part in (folder.parent, folder):
            if not part.exists() and not part.is_symlink():
                part.parent.mkdir(parents=True, exist_ok=True)
                try:
                    part.mkdir(mode=0o700)
                except FileExistsError:  # another training has just made it
                    continue
                part.chmod(SHARED_MODE if is_shared else OWN_MODE)  # `mkdir` is subject to the umask
        found = folder.lstat()
    except OSError as error:
        raise ValueError(
            f"{FOLDER_VARIABLE if is_shared else 'the folder of the locks'}: {folder} can't be used "
            f"({error.strerror}); {way_out}"
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{FOLDER_VARIABLE}: {folder} is not a folder (or a symbolic link to one); delete it")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise ValueError(
            f"{FOLDER_VARIABLE}: in {folder}, every user can delete the locks of others; chmod 1777 {folder}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{FOLDER_VARIABLE}: user {_user(os.geteuid())} can't write to {folder}; chmod 1777 {folder}")
    return folder


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
        None if there is no such file, it is not one that a training writes, or the process has ended.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_HOLDER_BYTES:
            return None
        try:
            holder = json.loads(opened.read(MAX_HOLDER_BYTES + 1))
            pid, folder, since = holder["pid"], holder["folder"], float(holder["since"])
            if type(pid) is not int or not isinstance(folder, str) or not 0 <= since <= time.time() + 60:
                return None
            # another user's file may name any process
            if psutil.Process(pid).uids().real != found.st_uid:
                return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, psutil.Error):
            return None
    return {"pid": pid, "folder": folder, "since": since}


def describe_holder(device: str, folder: Path) -> str:
    """Describe the training that uses a device: process, folder and start.

    Args:
        device: Name of the device, one of `devices_used`.
        folder: Folder of the locks.
    """
    what = "the processor of this machine" if device == "cpu" else device.replace("gpu-", "GPU ", 1)
    files = sorted(folder.glob(f"{_file_name(device)}.*{HOLDER_SUFFIX}"))
    holder = next((holder for holder in map(read_holder, files) if holder is not None), None)
    if holder is None:  # the file is written a moment after the lock is taken
        forged = [file for file in files if not _was_written_by_me(file)]
        if not forged:
            return f"another training uses {what}; it has just begun"
        names = for_terminal(", ".join(file.name for file in forged[:3]))
        return f"another training uses {what}; {names} in {folder} should name it, but names no process of its owner"
    since = datetime.fromtimestamp(holder["since"])
    minutes = (time.time() - holder["since"]) / 60
    return for_terminal(
        f"another training uses {what}: process {holder['pid']} in {holder['folder']}, "
        f"since {since:%Y-%m-%d %H:%M:%S} ({minutes:.0f} min)"
    )


def _was_written_by_me(file: Path) -> bool:
    """Return whether a file belongs to this user: one of a training that was killed, or that is being written."""
    try:
        return file.lstat().st_uid == os.geteuid()
    except OSError:
        return True


def _file_name(device: str) -> str:
    return re.sub(r"[^\w-]", "_", device)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


@contextmanager
def _one_device(folder: Path, device: str, root: Path, when_busy: str) -> Iterator[None]:
    lock = folder / f"{_file_name(device)}.lock"
    descriptor = _acquire(lock, device, folder, when_busy)
    holder_file = None
    try:
        _delete_leftovers(folder, device)
        holder_file = _write_holder(folder, device, root)
        yield
    finally:
        if holder_file is not None:
            holder_file.unlink(missing_ok=True)
        os.close(descriptor)  # this unlocks it


def _write_holder(folder: Path, device: str, root: Path) -> Path:
    """Write the file that names this process, under a name that no one can foresee, and return its path."""
    text = json.dumps({"pid": os.getpid(), "folder": str(root), "since": time.time()})
    path = folder / f"{_file_name(device)}.{secrets.token_hex(8)}{HOLDER_SUFFIX}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    return path


def _delete_leftovers(folder: Path, device: str) -> None:
    """Delete this user's files of trainings that were killed; those of others, only they can delete."""
    for file in folder.glob(f"{_file_name(device)}.*{HOLDER_SUFFIX}"):
        with suppress(OSError):
            if file.lstat().st_uid == os.geteuid() and read_holder(file) is None:
                file.unlink()


def _open_lock(path: Path) -> int:
    """Open a lock file, and make it if it does not exist; it is never written.

    Raises:
        ValueError: There is something else than a lock file at the path.
    """
    common = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            # without O_CREAT, which Linux refuses for files of others in a folder such as /tmp (fs.protected_regular)
            descriptor = os.open(path, common)
        except FileNotFoundError:
            try:
                descriptor = os.open(path, common | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{path} is made and deleted again and again; delete it") from None
                continue
            os.fchmod(descriptor, 0o666)  # other users must be able to open it, too, whatever the umask
        except PermissionError:
            if time.monotonic() > deadline:  # its maker opens it to all users a moment after making it
                raise ValueError(f"{FOLDER_VARIABLE}: {path} can't be opened; its owner: chmod 666 {path}") from None
            time.sleep(POLL_S)
            continue
        except OSError as error:
            reason = "a symbolic link" if path.is_symlink() else (error.strerror or str(error)).lower()
            raise ValueError(f"{FOLDER_VARIABLE}: the lock {path} can't be opened ({reason}); delete it") from None
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
        raise ValueError(f"{FOLDER_VARIABLE}: {path} is not a lock file of a training; delete it")


def _try_lock(path: Path) -> int | None:
    """Lock a file and return its descriptor; None if another process has locked it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # a file that was deleted after it was opened here excludes no one
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise ValueError(f"{path} is made and deleted again and again; delete it")


def _acquire(path: Path, device: str, folder: Path, when_busy: str) -> int:
    descriptor = _try_lock(path)
    if descriptor is not None:
        return descriptor
    if when_busy == REFUSE:
        raise ValueError(
            f"{describe_holder(device, folder)}. Wait until it ends, or let this training wait: {BUSY_VARIABLE}={WAIT}"
        )
    reminded = -REMIND_S
    while descriptor is None:
        if time.monotonic() - reminded >= REMIND_S:
            print(
                f"waiting: {describe_holder(device, folder)}; to stop instead of waiting, set {BUSY_VARIABLE}={REFUSE}",
                flush=True,
            )
            reminded = time.monotonic()
        time.sleep(POLL_S)
        descriptor = _try_lock(path)
    return descriptor
