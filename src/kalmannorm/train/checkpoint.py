"""Checkpoint files: runs/<id>/checkpoint.pt and the one before it.

Written whole or not at all, with torch's checksums (CRC-32) of all that they hold; loaded without executing anything
that a file may hold. What is damaged in any way stands back behind the one before it.
"""

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from kalmannorm.errors import UserError, reason
from kalmannorm.files import clear_unfinished, write_atomically

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
State = dict[str, Any]  # with PARTS; plain values and tensors
PARTS = {"id", "model", "optimizer", "ranks", "epoch", "step", "seconds", "curves"}


def save(folder: Path, state: State) -> None:
    """Write the state; at every moment one of the two files is whole: the last one becomes the previous by a rename."""
    clear_unfinished(folder / NAME)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if (folder / NAME).exists():
        (folder / NAME).replace(folder / PREVIOUS)
    write_atomically(folder / NAME, buffer.getvalue())


def load(folder: Path, identity: str) -> State | None:
    """Return the state last saved, on the CPU; None if there is none.

    A damaged or foreign file is named; the previous one is used in its place. UserError: there is no good one.
    """
    problems = []
    for file in (folder / NAME, folder / PREVIOUS):
        if not file.exists():
            continue
        try:
            state = _read(file, identity)
        except Exception as error:  # torch raises many things for a damaged file
            problems.append(f"{file} is not a usable checkpoint ({reason(error)})")
            continue
        if problems:
            print(f"kalmannorm: {'; '.join(problems)}; going on from {file.name}", file=sys.stderr)
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}: delete it to start the run again")
    return None


def _read(file: Path, identity: str) -> State:
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is not that of what it holds")
    state: State = torch.load(file, map_location="cpu", weights_only=True)
    if missing := PARTS - set(state):
        raise ValueError(f"without {', '.join(sorted(missing))}")
    if state["id"] != identity:
        raise ValueError(f"it belongs to run {state['id']}, not to {identity}")
    return state
