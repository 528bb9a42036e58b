"""Forwards that a checkpoint runs again: their gradients must be those of the forward that was run once."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn

from kalmannorm.norm.groups import name_of

T = TypeVar("T")

# Code of torch.utils.checkpoint in which a forward runs for the first time, or again; what stands for the checkpoint in
# both, by the variable that holds it.
_FILE = torch.utils.checkpoint.__file__
_FIRST = {"forward": "ctx", "_checkpoint_impl": "gen", "checkpoint": "gen"}
_AGAIN = {"backward": "ctx", "unpack_hook": "frame"}


def is_run_again() -> bool:
    """Whether this forward is a checkpoint's second one, inside of a backward pass.

    It then draws and corrects as the first one did, and leaves moving averages as they are.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def once(layer: nn.Module, make: Callable[[], T]) -> T:
    """`make()`, which differs from forward to forward in training; in a checkpoint's second one, as in its first.

    It is kept with the checkpoint, so that any number of them may wait for their backward. RuntimeError: the checkpoint
    is not torch's, and more than one forward waits for its backward.
    """
    if not layer.training:
        return make()
    if torch.compiler.is_compiling():
        # Compiled code cannot look for a checkpoint around it; where it is compiled within one, it leaves for this.
        return torch.compiler.disable(once)(layer, make) if _is_compiled_within() else make()
    again, checkpoints = is_run_again(), _checkpoints()
    if not again and not checkpoints:
        value = make()
        if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True):
            # As a checkpoint that is not torch's would run it.
            layer.__dict__["_waiting"] = value, layer.__dict__.get("_waiting", (None, 0))[1] + 1
        return value
    outer = next((i for i, (_, is_second) in enumerate(checkpoints) if is_second), len(checkpoints))
    if not again:
        value = make()
    elif outer < len(checkpoints) and (record := _record(checkpoints[outer][0], layer)).values:
        value = record.next()
    else:
        value = _of_unknown(layer, make)
    for checkpoint, _ in checkpoints[:outer]:  # inside of it, others that run for the first time
        _record(checkpoint, layer).values.append(value)
    return value


def is_within() -> bool:
    """Whether this forward is in one of torch's checkpoints."""
    return not torch.compiler.is_compiling() and bool(_checkpoints())


def _is_compiled_within() -> bool:
    """Whether a checkpoint is being run as its code is compiled."""
    return bool(_checkpoints())


# torch.compiler.assume_constant_result, which does this, imports the whole compiler.
_is_compiled_within._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_unknown(layer: nn.Module, make: Callable[[], T]) -> T:
    """In the second forward of a checkpoint that is not torch's: what it was in the only one that waits."""
    if "_waiting" not in layer.__dict__:
        return make()
    value, number = layer.__dict__["_waiting"]
    if number > 1:
        raise RuntimeError(
            f"{name_of(layer)} is run again, by a checkpoint that is not torch.utils.checkpoint's, and {number} "
            "forwards wait for their backward: what it drew or corrected by is known of the last one alone. Take the "
            "backward of each before the next forward, or torch's checkpoint"
        )
    layer.__dict__["_waiting"] = value, 0
    return value  # type: ignore[no-any-return]


class _Record:
    """What one layer made within one checkpoint, call by call."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.read = (-1, 0)  # by which backward pass, and how many of them

    def next(self) -> Any:
        task = torch._C._current_graph_task_id()
        done = self.read[1] if self.read[0] == task else 0
        self.read = task, done + 1
        return self.values[done]


def _record(checkpoint: Any, layer: nn.Module) -> _Record:
    records: dict[int, _Record] = checkpoint.__dict__.setdefault("_kalmannorm", {})
    return records.setdefault(id(layer), _Record())


def _checkpoints() -> list[tuple[Any, bool]]:
    """torch's checkpoints that this forward is inside of, the innermost first, and whether each runs it again.

    What stands for one is the same object both times, and goes when its graph goes.
    """
    found: list[tuple[Any, bool]] = []
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE and (name := _FIRST.get(code.co_name) or _AGAIN.get(code.co_name)):
            checkpoint = frame.f_locals.get(name)
            if name == "gen" and checkpoint is not None:
                checkpoint = checkpoint.gi_frame.f_locals.get("new_frame")
            if checkpoint is not None:
                found.append((checkpoint, code.co_name in _AGAIN))
        frame = frame.f_back
    return found
