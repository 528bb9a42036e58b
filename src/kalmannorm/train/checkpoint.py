"""Checkpoint files: runs/<id>/checkpoint.pt and the previous one, which is used if the last one is damaged.

A file is written whole or not at all, with a checksum over its content, and loaded without executing code from it.
"""

import hashlib
import io
import math
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kalmannorm.errors import UserError, reason
from kalmannorm.files import clear_unfinished, write_atomically

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
CHECKSUM = "sha256"
State = dict[str, Any]  # plain values and tensors, with the keys PARTS
PARTS = {"id", "model", "optimizer", "ranks", "epoch", "step", "seconds", "curves"}


def save(folder: Path, state: State) -> None:
    """Write the state. One of the two files is whole at every moment: the last one is first renamed to the previous."""
    clear_unfinished(folder / NAME)
    buffer = io.BytesIO()
    torch.save(state | {CHECKSUM: checksum(state)}, buffer)
    if (folder / NAME).exists():
        (folder / NAME).replace(folder / PREVIOUS)
    write_atomically(folder / NAME, buffer.getvalue())


def load(folder: Path, identity: str, check: Callable[[State], None] = lambda state: None) -> State | None:
    """Return the state last saved, on the CPU; None if there is none.

    If the last file is damaged, belongs to another run, or makes `check` raise ValueError, say so on stderr and use the
    previous one. UserError: there are files, but no good one.
    """
    problems = []
    for file in (folder / NAME, folder / PREVIOUS):
        if not file.exists():
            continue
        try:
            state = _read(file, identity)
            check(state)
        except Exception as error:  # torch and `check` raise all kinds of exceptions for a damaged file
            problems.append(f"{file} is not a usable checkpoint ({reason(error)})")
            continue
        if problems:
            print(f"kalmannorm: {'; '.join(problems)}; going on from {file.name}", file=sys.stderr)
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}: delete it to start the run again")
    return None


def _read(file: Path, identity: str) -> State:
    """Load and check a file. An exception (of many kinds): it is damaged, or belongs to another run."""
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > file.stat().st_size:
            raise ValueError("its members claim more than it has")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    if missing := PARTS - state.keys():
        raise ValueError(f"without {', '.join(sorted(missing))}")
    if state["id"] != identity:
        raise ValueError(f"it belongs to run {state['id']}, not to {identity}")
    expected = state.pop(CHECKSUM, None)  # None: an older version wrote the file, without a checksum
    if expected is not None and expected != checksum(state):
        raise ValueError("its checksum is not that of what it holds")
    for key in ("epoch", "step"):
        if type(state[key]) is not int or state[key] < 0:
            raise ValueError(f"{key} is {state[key]!r}")
    if type(state["seconds"]) is not float or not 0 <= state["seconds"] < math.inf:
        raise ValueError(f"seconds is {state['seconds']!r}")
    return state


def checksum(value: object) -> str:
    """Hash tensors (type, shape and bytes), numbers, text, and lists and dictionaries of them: 64 digits of sha256."""
    total = hashlib.sha256()
    _add(total, value)
    return total.hexdigest()


def _add(total: "hashlib._Hash", value: object) -> None:
    if isinstance(value, torch.Tensor):
        total.update(f"tensor {value.dtype} {list(value.shape)};".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        total.update(f"dict {len(value)};".encode())
        for key, of in value.items():
            _add(total, key)
            _add(total, of)
    elif isinstance(value, list | tuple):
        total.update(f"{type(value).__name__} {len(value)};".encode())
        for of in value:
            _add(total, of)
    elif isinstance(value, float):
        total.update(b"float " + struct.pack("<d", value))
    elif value is None or isinstance(value, int | str):
        total.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(f"{type(value).__name__} in a checkpoint")
