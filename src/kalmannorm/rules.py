"""How the rules of operations are written: what Threader looks up, and what a rule says.

A rule gets the threader, the node and the node of its first input. It says which nodes' beliefs it needs and how to
write its own, or, as a string, why there is none.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import fx

from kalmannorm.layout import Layout

if TYPE_CHECKING:
    from kalmannorm.thread import Threader


class Carry(NamedTuple):
    """A belief that passes: the nodes whose beliefs it is made of, and what writes it, given those.

    `layout`: of the operation's value, if known. `curve`: what it computes of needs[0], as a formula with "{}" in it,
    where it acts on every pixel by itself.
    """

    needs: list[fx.Node]
    write: Callable[[list[fx.Node]], fx.Node]
    layout: Layout | None = None
    curve: str = ""


Rule = Carry | str
Operation = Callable[["Threader", fx.Node, fx.Node], Rule]


def as_it_is(beliefs: list[fx.Node]) -> fx.Node:
    return beliefs[0]


def unchanged(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    """The same belief, pixel by pixel."""
    return Carry([x], as_it_is, t.layouts[x], "{}")
