"""Flows in a terminal, with the Prefect server of `make ui` or else a temporary one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.processes.environment import prepare_prefect

prepare_prefect()

from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.processes.servers import ServerFailed, start_own_prefect_server

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130


def run_in_terminal(call: Callable[[], State[Any]]) -> int:
    """Run a flow to its end.

    Args:
        call: Calls the flow and returns its final state.

    Returns:
        0 on success, 1 if it failed, 130 after Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with api_settings():
            state = call()
    except KeyboardInterrupt:
        print("error: interrupted; finished stages are kept, run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ServerFailed as failure:
        return refuse(failure, EXIT_FAILED)
    if state.is_completed():
        return 0
    print(f"error: {state.message}", file=sys.stderr)
    return EXIT_FAILED


def refuse(reason: Exception, code: int = EXIT_REFUSED) -> int:
    """Print why a run can't be started, and return the exit code."""
    print(f"error: {reason}", file=sys.stderr)
    return code


@contextmanager
def api_settings() -> Iterator[None]:
    """Use the configured Prefect API, or else start a server for this process."""
    if PREFECT_API_URL.value() is not None:
        yield
        return
    url, credential = start_own_prefect_server(Path.cwd().resolve())
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: credential}):
        yield
