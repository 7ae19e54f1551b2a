"""Address of a tracking store: where it is, whether it can be used, and the lock of those that write to it.

MLflow is not imported here, as `stages check` must start fast.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import psutil
from filelock import FileLock, Timeout

from stages.checkout.paths import cache_folder
from stages.checkout.redaction import redact

SQLITE = "sqlite:///"

SQLITE_HEADER = b"SQLite format 3\0"

KEY = "publish.tracking_uri"

VIEW_TAG = "mlflow.sharedViewState.sft"
"""Tag of the experiment with the view `VIEW` of its table of runs, which shows the main figures."""

VIEW = VIEW_TAG.rpartition(".")[2]

HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}
"""Environment variables of MLflow: one more attempt, and seconds per attempt. By default it tries for minutes."""

ANSWER_S = 25.0
"""Seconds in which a store must answer when it is opened."""

REMIND_S = 30.0
"""Seconds between two messages of a process that waits for the lock of a store."""

WAY_OUT = (
    f"Start the server, or correct {KEY} in params.yaml; `sqlite:///mlflow.db` is a file in the checkout and needs no "
    "server"
)

Value = TypeVar("Value")


def absolute_uri(uri: str, home: Path) -> str:
    """Make the path of a SQLite URI absolute, relative to `home`; other URIs are returned unchanged."""
    if not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_absolute():
        return uri
    return f"{SQLITE}{home / uri.removeprefix(SQLITE)}"


def database(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def check_database(file: Path) -> None:
    """Check that a file is a SQLite database that can be written, or that it can be created.

    Raises:
        ValueError: It is not, or can't be.
    """
    place = next(path for path in (file, *file.parents) if path.exists())
    if place == file and not file.is_file():
        raise ValueError(f"{KEY}: {file} is not a file. {WAY_OUT}")
    if place != file and not place.is_dir():
        raise ValueError(f"{KEY}: {file} can't be created, as {place} is not a folder. {WAY_OUT}")
    try:
        if place == file:
            file.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{KEY}: {file} can't be written: {error.strerror}. {WAY_OUT}") from None
    if place == file and file.stat().st_size:
        with file.open("rb") as stream:
            if stream.read(len(SQLITE_HEADER)) != SQLITE_HEADER:
                raise ValueError(f"{KEY}: {file} is not a SQLite database. {WAY_OUT}")


def answered_in_time(stated: str, ask: Callable[[], Value], seconds: float | None = ANSWER_S) -> Value:
    """Return what a question to a store returns, if the store answers in time.

    With a limit, the question is asked in a thread, as neither MLflow nor the drivers of databases have a limit for all
    their attempts together.

    Args:
        stated: The address as params.yaml states it.
        ask: Asks the question.
        seconds: The limit; None = no limit.

    Raises:
        ValueError: The store did not answer in time, or the question failed; the message names the address.
    """
    for variable, value in HTTP_LIMITS.items():
        os.environ.setdefault(variable, value)
    answers: list[Value] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # drivers of databases raise anything
            errors.append(error)

    if seconds is None:
        work()
    else:
        thread = threading.Thread(target=work, name="open-store", daemon=True)
        thread.start()
        thread.join(seconds)
    if answers:
        return answers[0]
    shown = redact(stated)
    if not errors:
        raise ValueError(f"{KEY} {shown!r}: the store did not answer within {seconds:.0f} s. {WAY_OUT}")
    reason = redact(" ".join(str(errors[0]).split()) or type(errors[0]).__name__)[:400]
    raise ValueError(f"{KEY} {shown!r}: the store can't be used: {reason}. {WAY_OUT}") from errors[0]


@contextmanager
def locked_store(uri: str) -> Iterator[None]:
    """Lock a store for the block: no other process of this machine opens it, looks for a run or creates one meanwhile.

    The lock may be taken again within the block. The kernel releases it when the process ends, however it ends.

    Args:
        uri: Absolute address of the store.

    Raises:
        ValueError: The lock file can't be created.
    """
    file = _lock_file(uri)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, is_singleton=True)
        while True:
            try:
                lock.acquire(timeout=REMIND_S)
                break
            except Timeout:
                print(f"waiting: another process is recording in {redact(uri)}", flush=True)
    except OSError as error:
        raise ValueError(f"{KEY}: {file} can't be written: {error.strerror}. {WAY_OUT}") from error
    try:
        yield
    finally:
        lock.release()


def _lock_file(uri: str) -> Path:
    """Return the lock file of a store: next to the file of a SQLite store, else in the user's cache."""
    file = database(uri)
    if file is not None:
        return file.with_name(f"{file.name}.lock")
    return cache_folder() / "locks" / f"store-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"


def is_remote(uri: str) -> bool:
    """Return whether a store is reached over a network, so that it may be unreachable."""
    return bool(urlsplit(uri).scheme) and urlsplit(uri).scheme not in ("sqlite", "file")


def this_process() -> str:
    """Return what identifies this process among all, also after its number is used again: host, number, start."""
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def has_ended(process: str) -> bool:
    """Return whether a process, as `this_process` names it, is known to have ended; those of other hosts are not."""
    host, number, start = process.rsplit(" ", 2) if process.count(" ") >= 2 else ("", "", "")
    if host != socket.gethostname():
        return False
    try:
        found = psutil.Process(int(number))
        # the clock may have been set meanwhile
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - int(start)) > 2
    except psutil.NoSuchProcess:
        return True
