"""Programs that are stopped from outside, by Ctrl-C or SIGTERM, and the processes they started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
# A terminal, make and the like may each pass on one Ctrl-C.
_ONE_PRESS_SECONDS = 2.0


@contextmanager
def stoppable() -> Iterator[None]:
    """Lets SIGTERM, by which schedulers and containers stop a program, end a block as Ctrl-C does.

    Both raise KeyboardInterrupt, in this process only: those that it forks ignore Ctrl-C, as the
    terminal sends it to all, and end without a word on SIGTERM. A signal that comes twice within
    two seconds counts once, so that what the first one makes a program write is written. Processes
    that the block has started and would wait for are ended.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals arrive
        yield
        return
    owner, last = os.getpid(), -_ONE_PRESS_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if time.monotonic() - last < _ONE_PRESS_SECONDS:
            return
        last = time.monotonic()
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGINT]
    # A program that was started to ignore Ctrl-C, as by nohup or &, goes on doing so.
    numbers = [n for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            if not child.daemon:  # loaders end their workers themselves
                child.terminate()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_interrupts(worker: int) -> None:
    """Lets a loader's worker leave Ctrl-C to the main process: only that one has something to say.

    The worker ignores the signal, and that the main process hangs up while it fetches a tensor,
    which multiprocessing's own thread would print with a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _tell_unless_hung_up


def _tell_unless_hung_up(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, EOFError | ConnectionError | multiprocessing.AuthenticationError):
        sys.__excepthook__(kind, error, traceback)
