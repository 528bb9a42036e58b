"""What went wrong, said to the person who can put it right."""

import difflib
import signal
from collections.abc import Iterable

# Words by which libraries' RuntimeErrors say so.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
TOO_MANY_FILES = "Too many open files"
OF_A_WORKER = "DataLoader worker"  # that was killed, or has no room left


class UserError(Exception):
    """Bad input, data or surroundings: something the user can put right, as opposed to a bug of ours.

    The message is all the user sees (the command line prints it as one line and exits with code 2), so it names the
    thing, its value, what was expected, and what to do.
    """


def absent(name: str, found: str, remedy: str) -> UserError:
    """Return the error for a data set that is not there: what was looked for and where, and how to get it."""
    remedies = f"{remedy}, or say where it is by DATA=... or data=...; `dataset=digits` runs without any download"
    return UserError(f"data set {name!r} is not there: {found}; {remedies}")


def reason(error: BaseException) -> str:
    """Return what a library's exception says, in one line: of an OSError what the system said, else the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


class Stopped(BaseException):
    """A signal asked a run to leave; what it had is saved.

    No Exception, so that nothing that expects a library to raise anything at all takes it for that.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on")
        self.exit_code = 128 + number


def nearest(name: str, valid: Iterable[str], kind: str = "name") -> str:
    """Return the message for a name that is not among the valid ones, with the closest of them if there is a close one.

    >>> nearest("cifar11", ["digits", "cifar10"], "dataset")
    "unknown dataset 'cifar11'; did you mean 'cifar10'? valid: digits, cifar10"
    """
    names = list(valid)
    folded = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    guess = f"did you mean {folded[close[0]]!r}? " if close else ""
    return f"unknown {kind} {name!r}; {guess}valid: {', '.join(names)}"
