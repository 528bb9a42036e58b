"""Find the convolutions that need a predictor of their own (draws for sampling, a learned transition), in order.

These are the convolutions whose belief reaches a normalizer. A predictor stands beside its convolution as
`conv1_noise`, also in state dicts. Draws are keyed by the predictor's number, which counts in the order of the
normalizers and, for each of them, in the order of the convolutions that lead to it.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.conv import _ConvNd

from kalmannorm.conversion.batch_norms import normalize
from kalmannorm.conversion.names import CHECKPOINT
from kalmannorm.conversion.operations import SIGNS, make_dict, rule_of, rule_of_class
from kalmannorm.conversion.trace import IN_SEGMENTS, Trace
from kalmannorm.norm import Estimator
from kalmannorm.norm.belief import Args, Kwargs
from kalmannorm.norm.moments import Predictor

Traces = dict[nn.Module, dict[str, Trace]]


class Value:
    """What is known of a value's belief before anything runs.

    Attributes:
        needs: the values whose beliefs it is computed from.
        lost: whether it has no belief.
        single: whether the belief has one row for all groups on all devices.
        layer: name and module of the convolution that computed the value, or None.
    """

    def __init__(self, needs: list["Value"], lost: bool = False, single: bool = True) -> None:
        self.needs = needs
        self.lost: bool = lost or any(need.lost for need in needs)
        self.single: bool = all(need.single for need in needs) if needs else single
        self.layer: tuple[str, _ConvNd] | None = None


class Search:
    """Walks through traced forwards as they call each other, and calls `found` for each convolution that it finds.

    `mode`: which traces it follows, `train` or `eval`. found(name, convolution, single): single as of Value.
    """

    def __init__(self, traces: Traces, mode: str, found: Callable[[str, _ConvNd, bool], None]) -> None:
        self.traces, self.mode, self.found = traces, mode, found
        self.done: set[Value] = set()

    @staticmethod
    def given(known: str | None) -> Value:
        """Return the Value of the model's input. `known`: the `input_belief` of forwards.root_code."""
        return Value([], lost=known is None, single=known != "argument")

    def run(self, module: nn.Module, path: str, given: dict[str, Any], first: Any) -> Any:
        """Walk through a module's forward and return the Value of its result, or a structure of Values.

        `path`: the module's name. `given`: the arguments' Values by name; `first`: that of the first argument.
        """
        if type(module).forward is nn.Sequential.forward:
            for name, child in [item for item in module.named_children() if not isinstance(item[1], Predictor)]:
                first = self._module(child, f"{path}.{name}" if path else name, (first,), {}, first)
            return first
        if module not in self.traces:
            for name, layer in list(module.named_modules()):
                if isinstance(layer, _ConvNd):
                    self.found(f"{path}.{name}" if path else name, layer, False)
            return Value([])
        env: dict[fx.Node, Any] = {}
        for node in self._graph(module).nodes:
            if node.op == "placeholder":
                name = str(node.target).lstrip("*")
                env[node] = given.get(name, first if not env else None)
            elif node.op == "output":
                return map_aggregate(node.args[0], lambda item: env.get(item) if isinstance(item, fx.Node) else item)
            elif node.op != "get_attr":
                env[node] = self._value(module, path, node, env)
        return None

    def _graph(self, module: nn.Module) -> fx.Graph:
        of = self.traces[module]
        return (of.get(self.mode) or of["train"]).graph

    def _value(self, module: nn.Module, path: str, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """Return the Value of a node's result from those of the nodes before it."""

        def of(value: Any) -> Any:
            return map_aggregate(value, lambda item: env.get(item) if isinstance(item, fx.Node) else None)

        args, kwargs = of(node.args), of(dict(node.kwargs))
        first = args[0] if args else next(iter(kwargs.values()), None)
        if node.op == "call_module":
            name = f"{path}.{node.target}" if path else str(node.target)
            return self._module(module.get_submodule(str(node.target)), name, args, kwargs, first)
        if node.target in (CHECKPOINT, IN_SEGMENTS):
            called = node.args[0]
            if node.target is IN_SEGMENTS:
                args = (None, *args[2:], *kwargs.values())
            name = str(called.target) if isinstance(called, fx.Node) else ""
            return self._module(module.get_submodule(name), f"{path}.{name}" if path else name, args[1:], {}, args[1])
        if node.target is normalize:
            return self._normalized(module, first)
        if node.target is make_dict:
            return dict(zip(node.args[0], args[1], strict=True))  # type: ignore[arg-type]
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(first, list | tuple | dict):
            try:
                return first[node.args[1]]  # type: ignore[index, call-overload]
            except (KeyError, IndexError, TypeError):
                return None
        needs = _values(args[:2] if node.target in SIGNS else first)
        if not needs:
            return None
        return Value(needs, lost=rule_of(node.target) is None)

    def _module(self, child: nn.Module, path: str, args: Args, kwargs: Kwargs, first: Any) -> Any:
        """Return the Value of what a module returns; walk through its forward if it holds normalizers."""
        if isinstance(child, Estimator):
            return self._normalized(child, first) if child not in self.traces else self._run(child, path, args, kwargs)
        if (
            child in self.traces
            or type(child).forward is nn.Sequential.forward
            or any(isinstance(layer, Estimator) for layer in child.modules())
        ):
            return self._run(child, path, args, kwargs)
        needs = _values(first)
        if not needs:
            return None
        linear = type(child).forward is nn.Linear.forward
        value = Value(needs, lost=not (isinstance(child, _ConvNd) or linear or rule_of_class(type(child))[0]))
        if isinstance(child, _ConvNd):
            value.layer = path, child
        return value

    def _run(self, child: nn.Module, path: str, args: Args, kwargs: Kwargs) -> Any:
        names = list(inspect.signature(type(child).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        return self.run(child, path, given, args[0] if args else None)

    def _normalized(self, layer: Any, x: Any) -> Value:
        """Report the convolutions that a normalizer's prior needs. Return the Value of the normalizer's output."""
        for value in _values(x):
            if not value.lost:
                self._demand(value)
        if not isinstance(layer, Estimator):
            return Value([], lost=True)
        return Value([], single=layer.belief == "output")

    def _demand(self, value: Value) -> None:
        """Report the convolutions from which a value's belief is computed, the earlier ones first."""
        if value in self.done:
            return
        self.done.add(value)
        for need in value.needs:
            self._demand(need)
        if value.layer is not None:
            self.found(*value.layer, value.single)


def _values(structure: Any) -> list[Value]:
    if isinstance(structure, Value):
        return [structure]
    if isinstance(structure, list | tuple):
        return [value for item in structure for value in _values(item)]
    return []
