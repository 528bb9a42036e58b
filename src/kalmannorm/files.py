"""Write files whole or not at all, and check permission and space before the work is done."""

import errno
import glob
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from kalmannorm.errors import UserError, reason


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if power fails. UserError: no permission, no space."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(file)
            _sync(file.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {file}: {reason(error)}") from None


def clear_unfinished(file: Path) -> None:
    """Remove the temporary files of processes killed while writing `file`. No other process may be writing it now."""
    for left in file.parent.glob(f".{glob.escape(file.name)}.*"):
        left.unlink(missing_ok=True)


def check_writable(folder: Path, remedy: str = "name another by results= or runs=") -> None:
    """Raise UserError if no file can be written to the folder, or to the place where it will be made."""
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))  # lexists: also dangling links
    try:
        if max((len(os.fsencode(part)) for part in folder.parts), default=0) > os.pathconf(there, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=there):  # os.access is true for root, even if read-only
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; {remedy}") from None


def check_free_space(folder: Path, needed: int, remedy: str = "pass runs=FOLDER") -> None:
    """Make the folder. UserError: no file can be written there, or fewer than `needed` bytes are free."""
    check_writable(folder, remedy)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed; {remedy}")


def _sync(folder: Path) -> None:
    """Make a renaming permanent. Errors are ignored: the file is whole, and some systems cannot sync a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
