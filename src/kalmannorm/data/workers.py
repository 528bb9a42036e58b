"""Processes that read image files for a loader."""

import signal

GRACE = 20  # seconds that a worker lives on after SIGTERM


def begin_worker(number: int) -> None:
    """Settle a worker's signals: those that ask a run to stop reach its whole process group: the run needs its workers
    to end the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # also how an interpreter that ends ends its workers
