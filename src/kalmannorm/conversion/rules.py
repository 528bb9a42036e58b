"""How the rules of operations are written: what a rule is given, and what it says.

A rule is given an operation that just ran, with its real tensors and the beliefs of its arguments. It returns the
belief of the operation's value, or, as a string, why there is none (an empty one: nothing that is worth saying).
"""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from kalmannorm.norm import moments
from kalmannorm.norm.belief import Args, Belief, Carried, Kwargs


class Operation(NamedTuple):
    """One that ran: its value y, its arguments, and their beliefs in structures parallel to them.

    `kind` says of an arithmetic operation what was found when its code was read (write.py): which operand is a
    constant (`constant second`, `constant first`), or that one is a function of the other (`dependent`).
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
        """The first argument's."""
        return self.beliefs[0] if self.beliefs else next(iter(self.keyword_beliefs.values()), None)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def belief_of(self, position: int, name: str) -> Any:
        return self.beliefs[position] if position < len(self.beliefs) else self.keyword_beliefs.get(name)

    def located(self) -> Carried | None:
        """The first argument's belief with a letter for each of its axes."""
        if self.belief is None or not isinstance(self.x, Tensor):
            return None
        return located(self.belief, self.x.dim())


def fields_of(value: Any) -> dict[Any, Any] | None:
    """What a dict or a data class holds."""
    if isinstance(value, dict):
        return value
    return vars(value) if is_dataclass(value) and hasattr(value, "__dict__") else None


def has_belief(structure: object) -> bool:
    """Whether there is one in a structure of beliefs."""
    if isinstance(structure, Belief | Carried):
        return True
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    return isinstance(structure, list | tuple) and any(map(has_belief, structure))


Known: TypeAlias = "Belief | Carried | tuple[Known, ...] | list[Known] | dict[Any, Known] | None"
Found: TypeAlias = "Known | str"  # or why there is none
Rule = Callable[[Operation], Found]


def located(belief: Belief | Carried, dim: int) -> Carried:
    """A belief of a value with `dim` axes, with a letter for each."""
    if isinstance(belief, Belief):
        return Carried(belief, "nc" + "p" * (dim - 2))
    belief = moments.settled(belief)
    return belief if belief.axes else belief._replace(axes="nc" + "p" * (dim - 2))


def joined(carried: Carried) -> Belief | Carried:
    """In the shortest form."""
    if carried.axes[:2] == "nc" and not {"c", "n"} & set(carried.axes[2:]):
        carried = carried._replace(axes="")
    return carried.belief if not carried.axes and carried.relu == "closed" else carried


def lift(function: Callable[..., Belief], belief: Any, *rest: Any) -> Any:
    """`function` of a belief, whatever it carries."""
    if isinstance(belief, Belief):
        return function(belief, *rest)
    if isinstance(belief, Carried):
        belief = moments.settled(belief)
        return belief._replace(belief=function(belief.belief, *rest))
    return ""


def on_channels(function: Callable[..., Belief], belief: Any, *rest: Any) -> Any:
    """As lift, for a function that knows channels as axis 1 alone."""
    if isinstance(belief, Carried) and belief.axes:
        return "along another axis than the channels"
    return lift(function, belief, *rest)


def as_it_is(o: Operation) -> Found:
    """The same belief of the same tensor."""
    return o.belief


def unchanged(o: Operation) -> Found:
    """The same belief, pixel by pixel."""
    return moments.settled(o.belief) if isinstance(o.belief, Carried) else o.belief
