"""Define errors that the user can put right, and the wording of their messages."""

import difflib
import signal
from collections.abc import Iterable

# Texts by which these cases are recognized in the errors of libraries.
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # of gloo and NCCL
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
TOO_MANY_FILES = "Too many open files"
MANY_NAMES = 12  # more are not printed where similar ones are found
WORKER_ERROR = "DataLoader worker"  # was killed, or ran out of shared memory


class UserError(Exception):
    """Bad input, data or environment: something the user can put right, as opposed to a bug in this package.

    The message is all the user sees (the command line prints it as one line and exits with code 2), so it names the
    setting or file, its value, what was expected, and what to do.
    """


def missing_dataset(name: str, found: str, remedy: str) -> UserError:
    """Return the error for a missing data set. `found`: what was looked for and where; `remedy`: how to get it."""
    remedies = f"{remedy}, or say where it is by DATA=... or data=...; `dataset=digits` runs without any download"
    return UserError(f"data set {name!r} is not there: {found}; {remedies}")


def reason(error: BaseException) -> str:
    """Return a library's exception as one line: the bare message of an OSError or of FFmpeg, else all of it."""
    if words := getattr(error, "strerror", None):
        return str(words)
    return " ".join(str(error).split())[:200] or type(error).__name__


class Stopped(BaseException):
    """A signal asked a run to stop, and its state is saved.

    Not an Exception, so that code that catches any Exception of a library lets it pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on")
        self.exit_code = 128 + number


def nearest(name: str, valid: Iterable[str], kind: str = "name", where: str = "") -> str:
    """Return the message for an invalid name, with the most similar valid one if there is one.

    `where`: what lists all valid names. If it is given, and there are many, similar ones stand for them.

    >>> nearest("cifar11", ["digits", "cifar10"], "dataset")
    "unknown dataset 'cifar11'; did you mean 'cifar10'? valid: digits, cifar10"
    """
    names = list(valid)
    folded = {candidate.lower(): candidate for candidate in names}
    short = where and len(names) > MANY_NAMES
    close = [folded[one] for one in difflib.get_close_matches(name.lower(), folded, n=3 if short else 1)]
    if short and name and not close:
        close = [candidate for candidate in names if name.lower() in candidate.lower()][:3]
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"unknown {kind} {name!r}; {guess}" + (where if short and close else f"valid: {', '.join(names)}")
