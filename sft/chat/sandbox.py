"""Sandbox for chat templates: transformers' own, with limits on time, memory and the size of integers.

The time limit interrupts Python code only. A power of two large integers is a single C operation that may take hours,
and a repeated text is a single allocation that may exhaust the machine's memory, so both are limited separately.
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
"""Largest size of an integer in bits: more than any template needs, and fast to compute."""

MAX_BYTES = 2 << 30
"""Memory in bytes that a template may allocate in addition to what the process uses already."""


class TimeLimitError(ValueError):
    """A block took longer than its time limit."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a limit on the size of integers."""

    intercepted_binops = frozenset(("*", "**", "//", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters["round"] = bounded_round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation, unless its result would be too long an integer.

        Raises:
            SecurityError: The result, or an operand, has more than `MAX_BITS` bits.
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
    """Round as Jinja's filter `round` does, which computes ten to the power of the precision.

    Raises:
        SecurityError: The precision exceeds that of any float.
    """
    if isinstance(precision, int) and abs(precision) > sys.float_info.max_10_exp:
        raise SecurityError(f"round with precision {precision}")
    return do_round(value, precision, method)


@contextmanager
def bounded_templates() -> Iterator[None]:
    """Run templates that transformers compiles inside the block in `BoundedSandbox`, with a limit on memory.

    The memory limit (Linux only) applies to all allocations of the process inside the block; Python raises MemoryError
    beyond it.
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
    """Limit what the process may allocate inside the block to `num_bytes` more than it has (Linux only)."""
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
    """Return the bytes that the process has allocated, as the kernel counts them for RLIMIT_DATA."""
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
    """Interrupt the Python code of the block after a time.

    A timer that was running before continues afterwards. There is no limit outside of the main thread, and on systems
    without `signal.setitimer`.

    Args:
        seconds: Time limit in seconds, above 0.

    Raises:
        TimeLimitError: The block took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    started = time.monotonic()
    left_s, interval_s = signal.getitimer(signal.ITIMER_REAL)
    if 0 < left_s <= seconds:  # an earlier timer ends first
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
