"""Main program of the child process of `sft.untrusted.child`: it calls the functions that the parent names.

It runs as a script in a new interpreter, so that it shares neither memory nor open files nor secrets with the parent.
It limits itself: the kernel refuses memory beyond RLIMIT_DATA, and SIGALRM, for which nothing is installed, ends the
process even inside one long operation of C code.

A frame is its length in 8 bytes, and a text. Requests are marshalled, as the parent is trusted and this is fast;
answers are JSON, so that reading them can do the parent no harm.
"""

from __future__ import annotations

import importlib
import json
import marshal
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 2000
"""Longest message of an error in characters; what a template raises may be of any length."""

_limited_to: int | None = None


def serve(connection: socket.socket) -> None:
    """Answer requests until the parent closes the connection."""
    sys.path[:] = marshal.loads(_received(connection))
    functions: dict[str, Callable[..., Any]] = {}
    while True:
        name, arguments, seconds, num_bytes = marshal.loads(_received(connection))
        if name not in functions:
            # before the time limit begins: imports are slow on a busy machine, and what they run is trusted
            place, _, function = name.partition(":")
            if place not in sys.modules:
                getattr(importlib.import_module(place), "prepare_child", int)()
            module = sys.modules[place]
            functions[name] = getattr(module, function)
        _limit_memory(num_bytes)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer = _encoded(_answer(functions[name], arguments))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(len(answer).to_bytes(8, "little"))
        connection.sendall(answer)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    try:
        return {"value": function(*arguments)}
    except MemoryError:
        return {"error": "MemoryError", "message": ""}
    except Exception as error:
        return {"error": type(error).__name__, "message": _message(error)}
    except BaseException as error:  # a panic of Rust code
        return {"error": type(error).__name__, "message": _message(error)}


def _message(error: BaseException) -> str:
    try:
        return str(error)[:MAX_MESSAGE]
    except Exception:
        return ""


def _encoded(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer).encode("ascii")
    except MemoryError:
        return b'{"error": "MemoryError", "message": ""}'


def _received(connection: socket.socket) -> bytes:
    length = int.from_bytes(exactly(connection, 8), "little")
    return exactly(connection, length)


def exactly(connection: socket.socket, length: int) -> bytes:
    """Receive a number of bytes.

    Raises:
        EOFError: The other side closed the connection before.
    """
    data = connection.recv(length)
    if len(data) == length:
        return data
    parts = bytearray(data)
    while len(parts) < length:
        if not data:
            raise EOFError
        data = connection.recv(min(length - len(parts), 1 << 20))
        parts += data
    return bytes(parts)


def _limit_memory(num_bytes: int) -> None:
    """Limit what the process may allocate to `num_bytes` more than it has (Linux only)."""
    global _limited_to
    if num_bytes == _limited_to or not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  pathlib is slow to import
        used = int(file.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + num_bytes, resource.RLIM_INFINITY))
    _limited_to = num_bytes


def main() -> None:
    """Serve the connection whose file descriptor is the only argument."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the connection
    try:
        serve(socket.socket(fileno=int(sys.argv[1])))
    except (EOFError, ConnectionError):
        os._exit(0)  # the parent has gone


if __name__ == "__main__":
    main()
