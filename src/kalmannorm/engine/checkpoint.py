"""Checkpoints: runs/<id>/checkpoint.pt, written whole or not at all, loaded without executing anything."""

import io
from pathlib import Path
from typing import Any

import torch

from kalmannorm.errors import UserError
from kalmannorm.runs.record import write_atomically

NAME = "checkpoint.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / NAME, buffer.getvalue())


def load(folder: Path, identity: str) -> dict[str, Any] | None:
    """The state last saved, on the CPU; None if there is none. UserError: a damaged file, or another run's."""
    file = folder / NAME
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        found = state["id"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not a usable checkpoint ({reason}): delete it to start the run again") from None
    if found != identity:
        raise UserError(f"{file} belongs to run {found}, not to {identity}: move it away")
    return state
