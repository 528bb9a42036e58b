"""Forwards that a checkpoint runs again: their gradients must be those of the forward that was run once."""

import torch


def is_run_again() -> bool:
    """Whether this forward is a checkpoint's second one, inside of a backward pass.

    It then draws and corrects as the last forward in training did, and leaves moving averages as they are.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
