"""Ctrl-C and SIGTERM of a stage: none is lost, whatever the stage is doing, from its first import to its last moment.

DVC ignores Ctrl-C while a stage runs and goes by the stage's exit code, so that a stage which loses the signal lets DVC
start the next one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

AGAIN_S = 0.1
"""Seconds after which a signal is sent again whose exception was swallowed."""

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal sent to this process when its parent ends."""

STARTED_BY_DVC = "DVC_STAGE"
"""Environment variable that DVC sets for the commands of stages."""

_received: list[int] = []
"""Signals that were received since `heed_signals`."""


class Stopped(KeyboardInterrupt):
    """A signal asks this process to stop.

    Code of other packages may swallow the exception: destructors, callbacks from C, a bare `except:`. In that case the
    exception is deleted before `stoppable` has seen it, and the signal is sent again.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number
        self.seen = False

    def __del__(self) -> None:
        if not self.seen and _received and not sys.is_finalizing():
            timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), self.number))
            timer.daemon = True
            timer.start()


def heed_signals() -> None:
    """Raise `Stopped` in the main thread on Ctrl-C and SIGTERM, and end with DVC if it started this process.

    A signal that the starter of this process has set to be ignored, as `nohup` and shells do, remains ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    if STARTED_BY_DVC in os.environ:  # DVC leaves its stage running when a signal ends it
        tie_to_parent(signal.SIGTERM)


def stoppable(work: Callable[[], int]) -> int:
    """Do the work and return its exit code, or 128 plus the number of a signal that was received meanwhile.

    Afterwards signals end the process at once, so that one which arrives while Python exits is not lost either.
    """
    code = 1
    try:
        code = work()
    except Stopped as stop:
        stop.seen = True
    except Exception:
        if not _received:  # else it is what became of the signal's exception on its way here
            raise
    finally:
        _let_go()
    return 128 + _received[0] if _received else code


def tie_to_parent(number: signal.Signals) -> None:
    """Let the Linux kernel send this process a signal when its parent ends, even if the parent is killed."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise Stopped(number)


def _let_go() -> None:
    """Give the signals their default effect, which ends the process."""
    for number in SIGNALS:
        while signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
            try:
                signal.signal(number, signal.SIG_DFL)
            except BaseException as error:  # of a signal that arrived just now; `stoppable` returns its code
                if isinstance(error, Stopped):
                    error.seen = True
                else:  # of a handler that another package has set
                    _received.append(number)
