"""Beliefs: a feature map's distribution as predicted before it is measured, and how modules pass them to each other.

Every module that takes beliefs keeps one contract: `module(*args, **kwargs)` returns its ordinary result;
`module(*args, beliefs=..., **kwargs)` returns the result and its belief (Estimated or Returned).
"""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Args = tuple[Any, ...]  # a call's positional arguments
Kwargs = dict[str, Any]  # a call's keyword arguments


class Belief(NamedTuple):
    """A feature map's estimated distribution: a Gaussian with independent pixels and channels.

    Mean and variance, each [rows, C], in the feature's units and their square. One row per statistics group, or per
    image for GKN; a single row where all images share it (moving statistics, `belief="output"`).
    """

    mean: Tensor
    var: Tensor


class Carried(NamedTuple):
    """A belief and what later operations need to know about it; a plain Belief means Carried(belief).

    Attributes:
        belief: mean and variance of each channel, in the order of the tensor's axes.
        axes: one letter for each axis of the tensor: n images, c channels (which may take several axes), p pixels;
            empty if the channels are axis 1, as usual.
        relu: what a ReLU does to the belief. `closed`: rectify it. `ignored`: nothing (convert's relu=False).
            `sampled`: leave the ReLU to the next convolution, which rectifies its sample; until then it is `pending`.
    """

    belief: Belief
    axes: str = ""
    relu: str = "closed"


class Estimated(NamedTuple):
    """The result of a normalizer called with beliefs: y, and the belief that it hands on."""

    y: Any
    belief: Any


class Returned(NamedTuple):
    """The result of a converted module called with beliefs.

    Attributes:
        y: its ordinary result.
        belief: a structure parallel to y, with None where a value has no belief.
        changed: new beliefs of the arguments that it changed in place, by position; or None.
    """

    y: Any
    belief: Any
    changed: dict[int, Any] | None = None


# The beliefs of a call's arguments: (positional, by keyword), or that of the first argument alone, or none.
Beliefs: TypeAlias = Belief | Carried | tuple[Args, Kwargs] | tuple[()] | None


def pick(beliefs: Beliefs, position: int, name: str) -> Any:
    """Return the belief of one argument, or None; of all remaining arguments, if `name` begins with `*` or `**`."""
    if not beliefs:
        return None
    if isinstance(beliefs, Belief | Carried):
        return beliefs if position == 0 else None
    of_args, of_kwargs = beliefs
    if name.startswith("*"):
        return (of_kwargs if name.startswith("**") else of_args[position:]) or None
    return of_args[position] if position < len(of_args) else of_kwargs.get(name)
