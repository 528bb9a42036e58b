"""The interface of a rule, which says what an operation does to beliefs.

A rule is called with an operation that just ran: its real tensors and the beliefs of its arguments. It returns the
belief of the result or, if there is none, a string with the reason (empty where there is nothing to report).
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from kalmannorm.norm import moments
from kalmannorm.norm.belief import Args, Belief, Carried, Kwargs


class Operation(NamedTuple):
    """An operation that ran: its result y, its arguments, and their beliefs in structures of the same shape.

    `kind` is what the code around the operation shows (write.py, flow.py). In arithmetic: which operand is a constant
    (`constant second`, `constant first`), that both are functions of one value (`dependent`), or that their product is
    a known activation (`product`, a formula of PRODUCTS, and the position of its x). Of a convolution or linear layer:
    that the weight is made of features (`computed`).
    """

    y: Any
    args: Args
    kwargs: Kwargs
    beliefs: Args
    keyword_beliefs: Kwargs
    kind: str = ""

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    @property
    def belief(self) -> Any:
        """The first argument's belief."""
        return self.beliefs[0] if self.beliefs else next(iter(self.keyword_beliefs.values()), None)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def belief_of(self, position: int, name: str) -> Any:
        """Return the belief of an argument that may be given by position or by name."""
        return self.beliefs[position] if position < len(self.beliefs) else self.keyword_beliefs.get(name)

    def belief_with_axes(self) -> Carried | None:
        """Return the first argument's belief with a letter for each axis; None if it has none or is no tensor."""
        if self.belief is None or not isinstance(self.x, Tensor):
            return None
        return with_axes(self.belief, self.x.dim())


def fields_of(value: Any) -> dict[Any, Any] | None:
    """Return the items of a dict or a dataclass's fields, None for anything else."""
    if isinstance(value, dict):
        return value
    if not is_dataclass(value) or isinstance(value, type):
        return None
    return {field.name: getattr(value, field.name, None) for field in fields(value)}


def has_belief(structure: object) -> bool:
    """Say whether a structure of beliefs, in which some may be None, contains one."""
    if isinstance(structure, Belief | Carried):
        return True
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    return isinstance(structure, list | tuple) and any(map(has_belief, structure))


Known: TypeAlias = "Belief | Carried | tuple[Known, ...] | list[Known] | dict[Any, Known] | None"
Found: TypeAlias = "Known | str"  # a string is the reason why there is no belief
Rule = Callable[[Operation], Found]


def with_axes(belief: Belief | Carried, dim: int) -> Carried:
    """Spell out which of a value's `dim` axes holds images, channels or pixels, one letter each (belief.Carried)."""
    if isinstance(belief, Belief):
        return Carried(belief, "nc" + "p" * (dim - 2))
    belief = moments.relu_applied(belief)
    return belief if belief.axes else belief._replace(axes="nc" + "p" * (dim - 2))


def shortened(carried: Carried) -> Belief | Carried:
    """Bring a belief to its shortest form: without letters if the axes are the usual ones, a Belief if possible."""
    if carried.axes[:2] == "nc" and not {"c", "n"} & set(carried.axes[2:]):
        carried = carried._replace(axes="")
    return carried.belief if not carried.axes and carried.relu == "closed" else carried


def lift(function: Callable[..., Belief], belief: Any, *rest: Any) -> Any:
    """Apply `function` to the Belief inside of a Carried or to a plain one; "" where there is none."""
    if isinstance(belief, Belief):
        return function(belief, *rest)
    if isinstance(belief, Carried):
        belief = moments.relu_applied(belief)
        return belief._replace(belief=function(belief.belief, *rest))
    return ""


def on_channels(function: Callable[..., Belief], belief: Any, *rest: Any) -> Any:
    """Apply `function` as `lift` does, but only if the channels are axis 1."""
    if isinstance(belief, Carried) and belief.axes:
        return "along another axis than the channels"
    return lift(function, belief, *rest)


def as_it_is(o: Operation) -> Found:
    """Hand the belief on untouched, a pending ReLU included: the result is the argument itself."""
    return o.belief


def unchanged(o: Operation) -> Found:
    """Hand the belief on, a pending ReLU applied: the distribution of each pixel stays the same."""
    return moments.relu_applied(o.belief) if isinstance(o.belief, Carried) else o.belief
