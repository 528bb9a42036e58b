"""Checkpoint files: runs/<id>/checkpoint.pt and the one before it. Written whole or not at all, loaded without
executing anything that a file may hold."""

import io
import sys
from pathlib import Path
from typing import Any

import torch

from kalmannorm.errors import UserError
from kalmannorm.files import write_atomically

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
PARTS = {"id", "model", "optimizer", "ranks", "epoch", "step", "seconds", "curves"}


def save(folder: Path, state: dict[str, Any]) -> None:
    """At every moment one of the two files is whole: the last one becomes the previous one by a rename."""
    for left_by_a_kill in folder.glob(f".{NAME}.*"):
        left_by_a_kill.unlink()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if (folder / NAME).exists():
        (folder / NAME).replace(folder / PREVIOUS)
    write_atomically(folder / NAME, buffer.getvalue())


def load(folder: Path, identity: str) -> dict[str, Any] | None:
    """The state last saved, on the CPU; None if there is none.

    A damaged or foreign file is named; the previous one is used in its place. UserError: there is no good one.
    """
    problems = []
    for file in (folder / NAME, folder / PREVIOUS):
        if not file.exists():
            continue
        try:
            state = _read(file, identity)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"kalmannorm: {'; '.join(problems)}; going on from {file.name}", file=sys.stderr)
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}: delete it to start the run again")
    return None


def _read(file: Path, identity: str) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        found = state["id"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is not a usable checkpoint ({reason})") from None
    if found != identity:
        raise ValueError(f"{file} belongs to run {found}, not to {identity}")
    if missing := PARTS - state.keys():
        raise ValueError(f"{file} is not a usable checkpoint (without {', '.join(sorted(missing))})")
    return state
