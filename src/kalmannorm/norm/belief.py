"""What a normalizer knows of a feature map before it is measured, and how modules hand that to each other.

One contract for everything that takes beliefs: `module(*args, **kwargs)` returns what it always returns;
`module(*args, beliefs=..., **kwargs)` returns that together with its belief (Estimated, or Returned).
"""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Args = tuple[Any, ...]  # of a call
Kwargs = dict[str, Any]


class Belief(NamedTuple):
    """A feature map's estimated distribution: a Gaussian with independent pixels and channels.

    Mean and variance, each [rows, C], in the units of the feature and their square: one row per statistics group, one
    per image for GKN, a single one where moving statistics normalize.
    """

    mean: Tensor
    var: Tensor


class Carried(NamedTuple):
    """A belief with what the operations behind it must know of it; a Belief alone stands for Carried(belief).

    Attributes:
        belief: of the channels, in the order of the value's axes.
        axes: a letter for each axis of the value, n images, c channels (divided into several), p pixels; empty where
            the channels are axis 1, as usual.
        relu: what a ReLU does to it: `closed`, it is rectified; `ignored`, nothing (convert's relu=False); `sampled`,
            it waits for the next convolution, which rectifies its sample, and is then `pending`.
    """

    belief: Belief
    axes: str = ""
    relu: str = "closed"


class Estimated(NamedTuple):
    """What a normalizer returns where beliefs were given: y and the belief of what it normalized."""

    y: Any
    belief: Any


class Returned(NamedTuple):
    """What a converted module returns where beliefs were given.

    Attributes:
        y: what it returns without.
        belief: a structure parallel to y, None where there is none.
        changed: beliefs of arguments that it changed in place, by position; or None.
    """

    y: Any
    belief: Any
    changed: dict[int, Any] | None = None


# Of a call's arguments: (those of the positional ones, those of the others), or the first one's alone, or nothing.
Beliefs: TypeAlias = Belief | Carried | tuple[Args, Kwargs] | tuple[()] | None


def pick(beliefs: Beliefs, position: int, name: str) -> Any:
    """The belief of one argument; those of all that are left, for `*` or `**` ahead of its name."""
    if not beliefs:
        return None
    if isinstance(beliefs, Belief | Carried):
        return beliefs if position == 0 else None
    of_args, of_kwargs = beliefs
    if name.startswith("*"):
        return (of_kwargs if name.startswith("**") else of_args[position:]) or None
    return of_args[position] if position < len(of_args) else of_kwargs.get(name)
