"""Handle signals that ask a command to stop: SIGTERM; SIGUSR1, which Slurm sends before a job's time is over; and
SIGHUP, when the terminal is closed or its connection is lost.

A command stops at once where no work would be lost: while data are loaded, while a model is built, or in an evaluation
that can be repeated from a checkpoint. Within `finishing` (a step and its checkpoint, a file) it completes the work
first. A run of several processes goes on until they ask each other whether to stop (train/loop.py). The exit code is
128 plus the signal's number, after which schedulers requeue the job.
"""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from kalmannorm.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_asked: list[int] = []  # numbers of the signals that came, in order
_depth = 0  # how many `finishing` contexts are open


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals by `handler` while the context lasts. SIGHUP stays ignored under nohup."""
    kept = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    before = {number: signal.signal(number, handler) for number in numbers if number not in kept}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def listening() -> Iterator[None]:
    """Raise Stopped when a signal asks this process to stop, while the context lasts. It may be nested; outside of the
    main thread, where Python cannot handle signals, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if all(signal.getsignal(number) is not _note for number in STOP_SIGNALS):
        _asked.clear()
    with handling(STOP_SIGNALS, _note):
        yield


@contextmanager
def finishing() -> Iterator[None]:
    """Hold Stopped back until the context ends. It may be nested: the outermost one raises it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _depth == 0 and _asked:
        raise Stopped(_asked[0])


def asked() -> int | None:
    """Return the number of the first signal that asked this process to stop, or None."""
    return _asked[0] if _asked else None


def drop_terminal(number: int) -> None:
    """Redirect output to nowhere after SIGHUP (`number`), unless it goes to a file: printing to a terminal or a pipe
    that is gone would fail before the work is saved."""
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            if not stat.S_ISREG(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
        os.close(nowhere)


def _note(number: int, frame: FrameType | None) -> None:
    drop_terminal(number)
    _asked.append(number)
    if _depth == 0:
        raise Stopped(number)
