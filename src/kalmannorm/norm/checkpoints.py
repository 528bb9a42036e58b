"""Forwards that an activation checkpoint runs again: they must have the gradients of a forward that runs once."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn

from kalmannorm.norm.groups import name_of

T = TypeVar("T")

# The functions of torch.utils.checkpoint that run a forward for the first time and again, each with the local variable
# that leads to the object which identifies the checkpoint.
_FILE = torch.utils.checkpoint.__file__
_FIRST = {"forward": "ctx", "_checkpoint_impl": "gen", "checkpoint": "gen"}
_AGAIN = {"backward": "ctx", "unpack_hook": "frame"}


def is_recomputation() -> bool:
    """Say whether this forward is a checkpoint's second one, within a backward pass.

    It must then draw and correct as the first one did, and leave the moving averages alone.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def preserved(layer: nn.Module, make: Callable[[], T]) -> T:
    """Return `make()`, or in a checkpoint's second forward what it returned in the first.

    For values that differ from forward to forward in training. They are kept with the checkpoint, so that any number of
    checkpoints may wait for their backward. RuntimeError: the checkpoint is not torch's, and more than one forward
    waits for its backward.
    """
    if not layer.training:
        return make()
    if torch.compiler.is_compiling():
        # Compiled code cannot look for a checkpoint around it: within one, it breaks the graph to do so.
        return torch.compiler.disable(preserved)(layer, make) if _is_compiled_within() else make()
    again, checkpoints = is_recomputation(), _checkpoints()
    if not again and not checkpoints:
        value = make()
        if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True):
            # Perhaps the first forward of a checkpoint that is not torch's.
            layer.__dict__["_waiting"] = value, layer.__dict__.get("_waiting", (None, 0))[1] + 1
        return value
    outer = next((i for i, (_, is_second) in enumerate(checkpoints) if is_second), len(checkpoints))
    if not again:
        value = make()
    elif outer < len(checkpoints) and (record := _record(checkpoints[outer][0], layer)).values:
        value = record.next()
    else:
        value = _value_of_waiting(layer, make)
    for checkpoint, _ in checkpoints[:outer]:  # checkpoints inside the one run again, which run for the first time
        _record(checkpoint, layer).values.append(value)
    return value


def is_within() -> bool:
    """Say whether this forward is in one of torch's checkpoints."""
    return not torch.compiler.is_compiling() and bool(_checkpoints())


def _is_compiled_within() -> bool:
    """Say whether the code that is being compiled runs within a checkpoint."""
    return bool(_checkpoints())


# What torch.compiler.assume_constant_result would set; using that imports the whole compiler.
_is_compiled_within._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _value_of_waiting(layer: nn.Module, make: Callable[[], T]) -> T:
    """Return, in the second forward of a checkpoint that is not torch's, the value of the only forward that waits."""
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
    """The values that `preserved` returned for one layer within one checkpoint, call by call."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.read = (-1, 0)  # the last backward pass that read values, and how many it has read

    def next(self) -> Any:
        task = torch._C._current_graph_task_id()
        done = self.read[1] if self.read[0] == task else 0
        self.read = task, done + 1
        return self.values[done]


def _record(checkpoint: Any, layer: nn.Module) -> _Record:
    records: dict[int, _Record] = checkpoint.__dict__.setdefault("_kalmannorm", {})
    return records.setdefault(id(layer), _Record())


def _checkpoints() -> list[tuple[Any, bool]]:
    """Return torch's checkpoints around this forward, innermost first, each with whether it runs the forward again.

    A checkpoint is identified by an object that is the same in both forwards, and is freed with its graph.
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
