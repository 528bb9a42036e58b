"""Lock a run by runs/<id>/lock, so that one process at a time works on it.

flock(2) is used, which the kernel releases when its holder dies, so that a crash leaves no lock behind. It works
between machines if the file system supports that: NFS from version 4 (and 3 with its lock daemon), Lustre and BeeGFS
when mounted with it, GPFS. If not, two machines may train the same run at once: that costs time but does no harm, since
files are written whole. On a file system without locks (Lustre without its option, NFS without its daemon), one warning
is printed and work goes on.
"""

import errno
import fcntl
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from kalmannorm.errors import UserError

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class Busy(UserError):
    """Another process works on the run."""


@contextmanager
def hold(runs: str | Path, identity: str) -> Iterator[int]:
    """Hold the lock of a run while the context lasts. Yield its file descriptor: a child that inherits it holds the
    lock too.

    Busy: another process holds it. UserError: no permission.
    """
    file = _file(runs, identity)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    try:
        if not _lock(handle, tries=5):  # several, as `holder` takes the lock for a moment
            raise Busy(f"run {identity} is being trained by {_owner(handle)}: wait for it, or stop it ({file})")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        with suppress(OSError):  # the name is a courtesy, not worth failing for on a full disk
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def holder(runs: str | Path, identity: str) -> str | None:
    """Describe the process that works on the run ("process 7 on HOST since ..."); None if there is none."""
    try:
        handle = os.open(_file(runs, identity), os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(handle) else _owner(handle)
    finally:
        os.close(handle)


def _lock(handle: int, tries: int = 1) -> bool:
    for left in reversed(range(tries)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05 if left else 0)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            _warn(os.fstat(handle).st_dev, error.strerror)
            return True
    return False


@functools.cache  # once for a file system
def _warn(device: int, reason: str) -> None:
    print(
        f"kalmannorm: the file system of runs= has no locks ({reason}): nothing keeps two processes from one run at "
        "once, which costs time and spoils nothing",
        file=sys.stderr,
    )


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 1000, 0))
        return " ".join(f"process {owner['pid']} on {owner['host']} since {owner['since']}".split())
    except (ValueError, KeyError, TypeError, RecursionError, OSError):  # its name is being written, or damaged
        return "another process"


def _file(runs: str | Path, identity: str) -> Path:
    return Path(runs) / identity / "lock"
