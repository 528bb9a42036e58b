"""Write beliefs into a traced forward: beside every value stands a variable with the value's belief.

Decided here is what only the code shows: which operand is a constant, which value is a function of which, and which
tensors are changed in place under another name. All else is left to the rules, which see the tensors.
"""

import inspect
import operator
import sys
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_aggregate

from kalmannorm.conversion.batch_norms import normalize
from kalmannorm.conversion.names import CHECKPOINT
from kalmannorm.conversion.operations import (
    CURVES,
    MODULES,
    SIGNS,
    VIEWS,
    WEIGHTED,
    formula_with,
    make_dict,
    same_items,
    with_parameters,
)
from kalmannorm.conversion.pixelwise import PRODUCTS
from kalmannorm.conversion.proxies import is_in_place
from kalmannorm.conversion.runtime import belief_of, call, changed, checkpointed, in_segments, key_of, lost, normalized
from kalmannorm.conversion.trace import IN_SEGMENTS
from kalmannorm.norm.belief import pick


class Summary(NamedTuple):
    """What a parent must know of a module.

    Attributes:
        curve: the formula of its result, `{}` being its first argument, if it acts pixel by pixel; else empty.
        mutates: positions of the arguments that it changes in place.
        aliases: positions of the arguments with which its result may share memory.
    """

    curve: str = ""
    mutates: frozenset[int] = frozenset()
    aliases: frozenset[int] = frozenset()


def summary_of_class(module: nn.Module) -> Summary:
    """Return the summary of a module that is not converted, which follows from its class."""
    key = type(module)
    curve = with_parameters(CURVES.get(key, ""), [getattr(module, name) for name in MODULES.get(key, ("", ()))[1]])
    in_place, view = getattr(module, "inplace", False) is True, key in VIEWS or key.__name__ in VIEWS
    return Summary(curve, frozenset({0} if in_place else ()), frozenset({0} if in_place or view else ()))


class Writer:
    """Writes beliefs into one graph, as it is constructed; `summary` is then what parents must know of the module."""

    def __init__(self, module: nn.Module, graph: fx.Graph, summaries: dict[nn.Module, Summary]) -> None:
        self.module, self.graph, self.summaries = module, graph, summaries
        self.summary = Summary()
        self._belief: dict[fx.Node, fx.Node | None] = {}
        self._constant: set[fx.Node] = set()  # values that are computed from parameters and buffers alone
        self._curve: dict[fx.Node, tuple[fx.Node, str]] = {}  # value -> the value that it is a function of, the formula
        self._latest: dict[fx.Node, fx.Node] = {}  # a tensor changed in place -> the operation that changed it last
        self._memory: dict[fx.Node, set[fx.Node]] = {}  # value -> all values that may share memory with it
        self._stale: dict[fx.Node, str] = {}  # a value that changed in place under another name -> a line that says how
        self._own: list[fx.Node] = []
        parameters = inspect.signature(type(module).forward).parameters.values()
        self._positions = {p.name: sys.maxsize if p.kind is p.KEYWORD_ONLY else i for i, p in enumerate(parameters, -1)}
        self._inputs: dict[int, fx.Node] = {}  # arguments by position, without the options that tracing froze
        self._mutated: set[fx.Node] = set()
        nodes = list(graph.nodes)
        self._start = next(node for node in nodes if node.op != "placeholder")
        first = next(node for node in nodes if node.op != "placeholder" or str(node.target).startswith("**"))
        with graph.inserting_before(first):
            self._beliefs = graph.placeholder("beliefs", default_value=None)
        for node in nodes:
            self._visit(node)
        for node in reversed(self._own):
            if not node.users:
                graph.erase_node(node)

    # --- beliefs ---

    def _now(self, node: fx.Node) -> fx.Node:
        """Return the node that holds a tensor's present value, after changes in place."""
        while node in self._latest:
            node = self._latest[node]
        return node

    def _beliefs_of(self, value: Any) -> Any:
        """Return the beliefs of a structure of values, in the same structure."""

        def one(item: Any) -> Any:
            if not isinstance(item, fx.Node):
                return None
            item = self._now(item)
            if item in self._stale:
                return self._add(lost, item, self._stale[item], name=f"{item.name}_lost")
            return self._belief.get(item)

        return map_aggregate(value, one)

    def _add(self, function: Any, *args: Any, name: str) -> fx.Node:
        """Add a call that computes a belief; it is erased at the end if nothing uses it."""
        node = self.graph.create_node("call_function", function, args, name=name)
        self._own.append(node)
        return node

    def _visit(self, node: fx.Node) -> None:
        """Write the belief of a node's result, and note what its formula is and which memory it shares."""
        first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        x = self._now(first) if isinstance(first, fx.Node) else None
        child: nn.Module | None = None
        key: Any = node.target
        if node.op == "placeholder":
            with self.graph.inserting_before(self._start):
                # The traced forward of a BatchNorm subclass may name its arguments otherwise; it has no options.
                position = self._positions.get(str(node.target).lstrip("*"), len(self._inputs))
                name = f"{node.name}_belief"
                self._belief[node] = self._add(pick, self._beliefs, position, str(node.target), name=name)
            self._inputs[position] = node
        elif node.op == "get_attr":
            self._constant.add(node)
        elif node.op == "output":
            return self._output(node)
        elif node.op == "call_module":
            child = self.module.get_submodule(str(node.target))
            key = type(child)
            of_constants = len(node.all_input_nodes) > 0 and set(node.all_input_nodes) <= self._constant
            node = self._call(node)
            if of_constants:  # for instance a weight that the module quantizes
                self._constant.add(node)
        elif node.target in (CHECKPOINT, IN_SEGMENTS):
            function = checkpointed if node.target is CHECKPOINT else in_segments
            node = self._pair(node, function, node.args[0], node.args[1:], dict(node.kwargs))
        elif node.target is normalize:
            # The base class normalizes: forwards.py replaces the string "self" by that class and the layer.
            node = self._pair(node, normalized, "self", node.args, {})
        elif set(node.all_input_nodes) <= self._constant:
            self._constant.add(node)
        else:
            self._function(node)
        self._note_memory(node, x, child, key)
        self._note_curve(node, x, child, key)

    def _call(self, node: fx.Node) -> fx.Node:
        with self.graph.inserting_before(node):
            child = self.graph.create_node("get_attr", str(node.target), name=f"{node.name}_module")
        value = self._pair(node, call, child, node.args, dict(node.kwargs))
        for i in self.summaries.get(self.module.get_submodule(str(node.target)), Summary()).mutates:
            given = node.args[i] if i < len(node.args) else None
            if isinstance(given, fx.Node):  # the changed argument has a new belief from here on
                pair = value.args[0]
                with self.graph.inserting_before(value):
                    self._belief[self._now(given)] = self._add(changed, pair, i, name=f"{given.name}_changed")
        return value

    def _pair(self, node: fx.Node, function: Any, called: Any, args: Any, kwargs: dict[str, Any]) -> fx.Node:
        """Replace a call that returns a value by one that returns the value and its belief. Return the new value."""
        with self.graph.inserting_before(node):
            beliefs = self._beliefs_of(args), self._beliefs_of(kwargs)
            given = (called, args, kwargs, *beliefs)
            pair = self.graph.create_node("call_function", function, given, name=f"{node.name}_and_belief")
            value = self.graph.create_node("call_function", operator.getitem, (pair, 0), name=f"{node.name}_y")
            self._belief[value] = self._add(operator.getitem, pair, 1, name=f"{node.name}_belief")
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        return value

    def _function(self, node: fx.Node) -> None:
        """Add the belief of a function's or method's result, if an argument may have one."""
        target, name = node.target, f"{node.name}_belief"
        if target is make_dict or (isinstance(target, type) and (issubclass(target, dict) or is_dataclass(target))):
            keys, values = node.args if target is make_dict else (tuple(node.kwargs), tuple(node.kwargs.values()))
            with self.graph.inserting_after(node):
                self._belief[node] = self._add(same_items, keys, self._beliefs_of(values), name=name)
            return
        if hasattr(target, "_fields"):  # a NamedTuple, which fx builds from values by position
            with self.graph.inserting_after(node):
                self._belief[node] = self._add(tuple, self._beliefs_of(node.args), name=name)
            return
        before = self._beliefs_of(node.args), self._beliefs_of(dict(node.kwargs))
        if not any(_nodes(before)):
            return
        with self.graph.inserting_after(node):
            given = (key_of(target), node, node.args, dict(node.kwargs), *before, self._kind(node))
            self._belief[node] = self._add(belief_of, *given, name=name)

    def _kind(self, node: fx.Node) -> str:
        """Return Operation.kind."""
        if node.target in WEIGHTED:
            weights = [*node.args[1:3], node.kwargs.get("weight"), node.kwargs.get("bias")]
            return "" if {w for w in weights if isinstance(w, fx.Node)} <= self._constant else "computed"
        if node.target not in SIGNS:
            return ""
        a, b = (
            node.args[i] if len(node.args) > i else node.kwargs.get(name) for i, name in enumerate(("input", "other"))
        )
        for operand, said in ((b, "constant second"), (a, "constant first")):
            if not isinstance(operand, fx.Node) or operand in self._constant:
                return said
        first, second = self._now(a), self._now(b)  # type: ignore[arg-type]
        if SIGNS[node.target] == "*":
            for i, (one, other) in enumerate(((first, second), (second, first))):
                root, formula = self._formula(other, one)
                if root is one and formula in PRODUCTS:
                    return f"product {formula} {i}"
        return "dependent" if self._formula(first)[0] is self._formula(second)[0] else ""

    # --- formulas ---

    def _formula(self, node: fx.Node, end: fx.Node | None = None) -> tuple[fx.Node, str]:
        """Return the value of which `node` is a function pixel by pixel (`end`, else the earliest), and the formula in
        terms of "x"."""
        if node is end or node not in self._curve:
            return node, "x"
        x, curve = self._curve[node]
        root, inner = self._formula(x, end)
        return root, curve.replace("{}", inner)

    def _note_curve(self, node: fx.Node, x: fx.Node | None, child: nn.Module | None, key: Any) -> None:
        """Note the formula of a node's result, if it is a function of its first argument x pixel by pixel."""
        if child is None and node.op.startswith("call_") and key in SIGNS:
            x, curve = self._curve_with_constant(node, SIGNS[key])
        elif x is None:
            return
        elif child is not None and child in self.summaries:
            curve = self.summaries[child].curve
        elif child is not None:
            curve = summary_of_class(child).curve
        else:
            curve = CURVES.get(key, "") if isinstance(key, str | type) or callable(key) else ""
            curve = with_parameters(curve, node.args[1:])
        if curve and x is not None:
            self._curve[node] = (x, curve)

    def _curve_with_constant(self, node: fx.Node, sign: str) -> tuple[fx.Node | None, str]:
        """Return the feature in arithmetic with a constant, and the formula; (None, "") for any other arithmetic."""
        operands = node.args if len(node.args) == 2 else (None, None)
        first, second = (str(one) if one in self._constant else one for one in operands)  # type: ignore[comparison-overlap]
        if isinstance(first, fx.Node):
            return self._now(first), formula_with(sign, second)
        return (self._now(second), formula_with(sign, first, first=True)) if isinstance(second, fx.Node) else (None, "")

    # --- memory that values share, and changes in place ---

    def _note_memory(self, node: fx.Node, x: fx.Node | None, child: nn.Module | None, key: Any) -> None:
        """Note whether a node's result shares memory with its first argument x, and whether the node changes x."""
        self._memory[node] = {node}
        if x is None or x not in self._memory:
            return
        summary = self.summaries.get(child) if child is not None else None
        name = key if isinstance(key, str) else getattr(key, "__name__", "")
        view = key in VIEWS or name in VIEWS if isinstance(key, str | type) or callable(key) else False
        if summary is not None:
            view, in_place = 0 in summary.aliases, False
            if 0 in summary.mutates:
                self._mutated |= self._memory[x]
                in_place = bool(summary.curve) and view
                if not in_place:
                    self._overwrite(node, x)
        elif child is not None:
            in_place = getattr(child, "inplace", False) is True
        else:
            in_place = is_in_place(name) or node.kwargs.get("inplace") is True or self._is_in_place_by_position(node)
        if in_place:
            self._overwrite(node, x)
            self._mutated |= self._memory[x]
            self._latest[x] = node
        if in_place or view:
            self._memory[node] = self._memory[x]
            self._memory[node].add(node)
            if key is nn.Identity or (summary is not None and summary.curve == "{}" and not in_place):
                self._latest[node] = x  # another name of the same tensor

    def _overwrite(self, node: fx.Node, x: fx.Node) -> None:
        """Mark the other names of x as stale, because `node` changes x in place."""
        for other in self._memory[x]:
            if self._now(other) is not x:
                self._stale[other] = f"{node.name.removesuffix('_y')} changes {other.name} in place under another name"

    @staticmethod
    def _is_in_place_by_position(node: fx.Node) -> bool:
        return node.target in (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.mish) and True in node.args[1:2]

    def _output(self, node: fx.Node) -> None:
        """Return (y, belief of y, beliefs of arguments changed in place) from the graph; set the summary."""
        (value,) = node.args
        positions = {given: i for i, given in self._inputs.items()}
        mutates = {positions[given] for given in self._mutated if given in positions}
        with self.graph.inserting_before(node):
            changes = {i: self._beliefs_of(self._inputs[i]) for i in sorted(mutates)}
            node.args = ((value, self._beliefs_of(value), changes or None),)  # type: ignore[assignment]
        returned = [
            item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, fx.Node)
        ]
        aliases = {positions[m] for item in returned for m in self._memory.get(item, ()) if m in positions}
        curve = ""
        if isinstance(value, fx.Node) and 0 in self._inputs:
            root, formula = self._formula(self._now(value))
            curve = formula.replace("x", "{}") if root is self._inputs[0] else ""
        self.summary = Summary(curve, frozenset(mutates), frozenset(aliases))


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_aggregate(value, lambda item: found.append(item) if isinstance(item, fx.Node) else None)
    return found
