"""Ctrl-C and SIGTERM of a stage: none is lost, whatever the stage is doing, from its first import to its last moment.

DVC ignores Ctrl-C while a stage runs and goes by the stage's exit code, so that a stage which loses the signal lets DVC
start the next one.

A training saves a checkpoint after SIGTERM (`delaying_sigterm`). Slurm, Kubernetes and clouds send it some time before
they end a process with SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

AGAIN_S = 0.1
"""Seconds after which a signal is sent again whose exception was swallowed."""

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal sent to this process when its parent ends."""

STARTED_BY_DVC = "DVC_STAGE"
"""Environment variable that DVC sets for the commands of stages."""

GRACE_VARIABLE, GRACE_S = "SFT_GRACE_S", 20.0
"""Environment variable with the seconds between SIGTERM and SIGKILL, and its default."""

STOP_FILE_VARIABLE = "SFT_STOP_FILE"
"""Environment variable with the path of a file that asks a training to save a checkpoint and stop.

It takes the place of SIGTERM in workers of Ray, which get no signals and may run on other machines.
"""

EXIT_SAVED = 75
"""Exit code of a training that SIGTERM stopped after it saved a checkpoint; EX_TEMPFAIL of sysexits.h."""

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


class SavedAndStopped(KeyboardInterrupt):
    """A training has stopped after SIGTERM and will go on from the checkpoint that it saved.

    Args:
        step: Step of the checkpoint.
    """

    exit_code = EXIT_SAVED

    def __init__(self, step: int) -> None:
        super().__init__(f"SIGTERM stopped the training, which has saved checkpoint-{step}")
        self.step = step


def grace_s(environment: Mapping[str, str] | None = None) -> float:
    """Return the seconds between SIGTERM and SIGKILL.

    Args:
        environment: Environment variables; None = those of this process.

    Raises:
        ValueError: SFT_GRACE_S is not a number above 0.
    """
    text = (os.environ if environment is None else environment).get(GRACE_VARIABLE, str(GRACE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"{GRACE_VARIABLE}={text!r}: it must be a number of seconds above 0, the time that passes between SIGTERM "
            "and SIGKILL"
        )
    return seconds


def patience_s(grace: float) -> float:
    """Return the seconds after which a training stops without a checkpoint, to end itself before SIGKILL does."""
    return max(0.5 * grace, grace - 5.0)


@contextmanager
def delaying_sigterm(grace: float) -> Iterator[Callable[[], bool]]:
    """Record SIGTERM within the block, for the training to stop where it can be resumed.

    If the block has not ended `patience_s(grace)` seconds later, `Stopped` is raised in it. More signals before that
    change nothing: the supervisor, the launcher and DVC may each send one. Ctrl-C stops the training at once, as ever.

    Args:
        grace: Seconds between SIGTERM and SIGKILL.

    Yields:
        Function that returns whether SIGTERM was received, or the file named by SFT_STOP_FILE exists.
    """
    file = Path(os.environ[STOP_FILE_VARIABLE]) if STOP_FILE_VARIABLE in os.environ else None
    before = signal.getsignal(signal.SIGTERM)
    # Python runs handlers in the main thread alone, and Ray runs a training in another
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield lambda: file is not None and file.exists()
        return
    asked = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            print("SIGTERM: saving a checkpoint after this step", file=sys.stderr, flush=True)
            signal.setitimer(signal.ITIMER_REAL, patience_s(grace))

    def give_up(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, _stop)
        _stop(signal.SIGTERM, frame)

    alarm_before = signal.signal(signal.SIGALRM, give_up)
    signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda: asked or (file is not None and file.exists())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm_before)
        signal.signal(signal.SIGTERM, before)


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
