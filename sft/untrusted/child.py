"""Child process that calls functions of this library on what comes from elsewhere, within limits of time and memory.

One child serves many calls, so that a call takes about as long as sending its arguments. It is started at the first
call, and again after it was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.untrusted import child_main

DEFAULT_BYTES = 2 << 30
"""Memory in bytes that a call may allocate in addition to what the child uses already."""

START_S = 120.0
"""Time in seconds that the child may need, besides the limit of a call, to start and to import modules."""

KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
"""Environment variables that the child gets; others may be secrets."""

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve more than they use, which the limit would count
}


class ChildError(ValueError):
    """A call that did not return in the child."""


class TookTooLongError(ChildError):
    """The call took longer than its time limit."""


class TookTooMuchMemoryError(ChildError):
    """The call wanted more memory than its limit."""


class CrashedError(ChildError):
    """The child ended during the call; the message is the name of the signal, or the exit status."""


class RaisedError(ChildError):
    """The call raised an error.

    Args:
        kind: Name of the error's class.
        message: Its message.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.message = message


def problem(error: ChildError, work: str) -> str:
    """Return a message for the user: what a call did instead of returning.

    Args:
        error: The error of the call.
        work: What the call does, as the beginning of a sentence: `decoding it`.
    """
    match error:
        case RaisedError():
            return error.message or error.kind
        case TookTooLongError() | TookTooMuchMemoryError():
            return f"{work} takes {error}"
        case _:
            return f"{work} ended the process that did it ({error})"


class Child:
    """Child process with limits. Calls from several threads wait for each other; a forked process starts its own.

    Args:
        num_bytes: Memory in bytes that a call may allocate.
    """

    def __init__(self, num_bytes: int = DEFAULT_BYTES) -> None:
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._owner = os.getpid()
        _children.add(self)

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """Call a function in the child and return its result, as JSON returns it.

        Args:
            function: A function of a module, which is imported in the child by its name.
            arguments: Values that `marshal` takes: numbers, texts, bytes, and lists, tuples and dicts of them.
            seconds: Time limit of the call.

        Raises:
            ChildError: The call took too long or too much memory, raised an error, or ended the child.
            ValueError: The arguments are of other types.
        """
        # version 2 does not look for objects that occur twice
        request = marshal.dumps(
            (f"{function.__module__}:{function.__qualname__}", arguments, seconds, self._num_bytes), 2
        )
        with self._lock:
            is_new = self._connection is None
            try:
                return self._called(request, seconds)
            except TookTooMuchMemoryError:
                if is_new:
                    raise
                return self._called(request, seconds)  # an old child may have kept memory of earlier calls

    def _called(self, request: bytes, seconds: float) -> Any:
        try:
            answer = self._answer(request, seconds)
            if answer.get("error") == "MemoryError":
                raise TookTooMuchMemoryError(f"more than {_size(self._num_bytes)} of memory")
        except BaseException:  # also Ctrl-C: the answer would be read as that of the next call
            self.close()
            raise
        if "error" in answer:
            raise RaisedError(answer["error"], answer["message"])
        return answer["value"]

    def _answer(self, request: bytes, seconds: float) -> dict[str, Any]:
        connection = self._connected()
        connection.settimeout(seconds + START_S)
        try:
            connection.sendall(len(request).to_bytes(8, "little") + request)
            length = int.from_bytes(child_main.exactly(connection, 8), "little")
            return json.loads(child_main.exactly(connection, length))
        except TimeoutError:
            raise TookTooLongError(f"more than {seconds:g} s") from None
        except (ConnectionError, EOFError):
            raise self._ended(seconds) from None

    def _connected(self) -> socket.socket:
        if self._connection is None:
            ours, theirs = socket.socketpair()
            with theirs:
                environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
                command = [sys.executable, "-S", "-E", "-s", "-P", str(Path(child_main.__file__)), str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env={**environment, **SETTINGS},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self._connection = ours
            root = str(Path(__file__).resolve().parents[2])
            path = marshal.dumps([root, *(entry or str(Path.cwd()) for entry in sys.path)], 2)
            ours.sendall(len(path).to_bytes(8, "little") + path)
        return self._connection

    def _ended(self, seconds: float) -> ChildError:
        """Return the error for a child that ended by itself."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=START_S)
        except subprocess.TimeoutExpired:
            return CrashedError("it closed its connection")
        if code == -signal.SIGALRM:
            return TookTooLongError(f"more than {seconds:g} s")
        return CrashedError(signal.Signals(-code).name if code < 0 else f"exit status {code}")

    def close(self) -> None:
        """Kill the child, if there is one; the next call starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _forget(self) -> None:
        """Leave the child to the process that this one was forked from."""
        self._lock = threading.Lock()
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.returncode = 0  # it is no child of this process, so that there is nothing to wait for
        self._process = self._connection = None
        self._owner = os.getpid()


_children: weakref.WeakSet[Child] = weakref.WeakSet()


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 30} GiB" if num_bytes % (1 << 30) == 0 else f"{num_bytes >> 20} MiB"


def _forget_all() -> None:
    for child in _children:
        child._forget()


def _close_all() -> None:
    for child in list(_children):
        with contextlib.suppress(OSError):
            child.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)
