"""The sandbox that chat templates run in: transformers' own, with limits on what Python's time limit can't interrupt.

A power of two large numbers is one step of C code that may take hours, and a repeated text one allocation that may
take the machine's memory. Both come before any limit on the time of Python code is looked at.

A limit on the time that foreign code, such as a chat template's, may take.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

MAX_BITS = 4096
"""Of a whole number: more than any text of a template needs, and computed at once."""

MAX_BYTES = 2 << 30
"""What a template may allocate besides what the process holds."""


class TimeLimitError(ValueError):
    """Something took longer than it may."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which whole numbers stay short."""

    intercepted_binops = frozenset(("*", "**", "//", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters["round"] = bounded_round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute, unless a number would become too long.

        Raises:
            SecurityError: It would.
        """
        if isinstance(left, int):
            bits = left.bit_length()
            if operator == "**" and isinstance(right, int):
                bits *= max(1, right)
            if bits > MAX_BITS:
                raise SecurityError(f"a number of {bits} bits, more than {MAX_BITS}")
        if isinstance(right, int) and right.bit_length() > MAX_BITS:
            raise SecurityError(f"a number of {right.bit_length()} bits, more than {MAX_BITS}")
        return super().call_binop(context, operator, left, right)


def bounded_round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    """Jinja's filter `round`, which computes ten to the power of the precision.

    Raises:
        SecurityError: The precision is beyond any number's.
    """
    if isinstance(precision, int) and abs(precision) > sys.float_info.max_10_exp:
        raise SecurityError(f"round with precision {precision}")
    return do_round(value, precision, method)


@contextmanager
def bounded_templates() -> Iterator[None]:
    """Have templates that transformers compiles in the block run in `BoundedSandbox`, with so much memory and no more.

    Memory is bounded where the system can (Linux), by a limit on what the whole process may allocate meanwhile; beyond
    it Python raises MemoryError.
    """
    before = chat_template_utils.ImmutableSandboxedEnvironment
    chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox
    try:
        with bounded_memory(MAX_BYTES):
            yield
    finally:
        chat_template_utils.ImmutableSandboxedEnvironment = before


@contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Let the process allocate so many bytes more within the block, and no more (Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = data_bytes() + num_bytes
    if before[0] != resource.RLIM_INFINITY and before[0] < limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def data_bytes() -> int:
    """What the process has allocated: the kernel's count that RLIMIT_DATA is compared with."""
    import resource

    # called for every chat; a file object takes three times as long
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 200).split()[5]) * resource.getpagesize()
    finally:
        os.close(file)


def _stop(number: int, frame: FrameType | None) -> None:
    raise TimeLimitError


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block after so many seconds, wherever its Python code is then.

    A timer that ran before goes on afterwards. Outside of the main thread, and where the system has no such timer,
    nothing is limited.

    Args:
        seconds: Above 0.

    Raises:
        TimeLimitError: The time is over.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    started = time.monotonic()
    left_s, interval_s = signal.getitimer(signal.ITIMER_REAL)
    if 0 < left_s <= seconds:  # somebody else's limit comes first
        yield
        return
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.monotonic() - started), 1e-3), interval_s)
