"""Threading beliefs through a traced network: which belief reaches each normalizer, or which operation lost it."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kalmannorm.layout import Layout
from kalmannorm.norm import Estimator
from kalmannorm.norm import moments as predict
from kalmannorm.norm.belief import Belief
from kalmannorm.norm.sampling import sampled_conv
from kalmannorm.operations import BY_NAME, OPERATIONS, VIEWS
from kalmannorm.pixelwise import linear, relu
from kalmannorm.rules import Carry, Operation, Rule
from kalmannorm.tracing import IN_PLACE

_INPLACE_OPERATORS = {getattr(operator, name) for name in IN_PLACE}


class Threader:
    """Adds belief nodes to a traced graph, on demand and only where they are used.

    `predictor`: "closed" or "sampling"; `relu`: whether rectification changes a belief; `input_belief`: names of the
    buffers that hold the model input's belief, the node that is that belief, or None; `add_noise(convolution's name)`
    makes a noise module and returns its name; `add_transition(convolution's name)` a transition, None where
    convolutions' weights are theirs; `kinds`: the class of the layer that each normalizer replaces.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        predictor: str,
        relu: bool,
        input_belief: tuple[str, str] | fx.Node | None,
        add_noise: Callable[[str, bool], str],
        add_transition: Callable[[str], str] | None,
        kinds: dict[str, type[nn.Module]],
    ) -> None:
        self.graph, self.modules, self.kinds = graph, modules, kinds
        self.predictor, self.relu, self.input_belief, self.add_noise = predictor, relu, input_belief, add_noise
        self.add_transition = add_transition
        self.inputs: dict[fx.Node, list[fx.Node]] = {}  # what an operation's first argument holds when it runs
        self.lost: dict[fx.Node, str | None] = {}  # what lost the belief of a node's value; None if it has one
        self.layouts: dict[fx.Node, Layout | None] = {}
        self.constants: dict[fx.Node, Tensor] = {}  # values made of parameters and buffers alone: their shapes
        self.pieces: set[fx.Node] = set()  # whose values are tuples
        self._rules: dict[fx.Node, Rule] = {}
        self._written: dict[fx.Node, fx.Node] = {}
        self._name = ""  # of the belief being written
        self._latest: dict[fx.Node, fx.Node] = {}  # a tensor changed in place -> the operation that changed it last
        self._alias: dict[fx.Node, fx.Node] = {}  # another name of a tensor -> the tensor
        self._memory: dict[fx.Node, list[fx.Node]] = {}  # the values that may share memory with this one
        self._overwritten: dict[fx.Node, fx.Node] = {}  # changed in place through another of those, by this operation
        for node in list(graph.nodes):
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
        self.inputs[node] = inputs = self._inputs(first)
        self._note_constant(node)
        self._rules[node] = rule = self._rule(node)
        self.layouts[node] = None if isinstance(rule, str) else rule.layout
        # The first operation that lost it is named, not the last.
        needs, why_not = (inputs, rule) if isinstance(rule, str) else (rule.needs, None)
        self.lost[node] = next(filter(None, map(self._lost_by_now, needs)), why_not)
        self._note_memory(node, inputs)

    def write(self, node: fx.Node) -> fx.Node:
        """The node that computes the belief of `node`'s value, written right behind it on first use."""
        if node not in self._written:
            rule = self._rules[node]
            assert not isinstance(rule, str)
            beliefs = [self.write(needed) for needed in rule.needs]
            self._name = f"{node.name}_belief"
            with self.graph.inserting_before(node.next):
                self._written[node] = rule.write(beliefs)
        return self._written[node]

    def why_not(self, node: fx.Node) -> str | None:
        """What keeps a normalizer of `node`'s value from a prior, or None."""
        known = self.layouts[node]
        if known is not None and known.axis(1) != "c":
            return f"{node.name} (its axis 1 is not that of the channels)"
        return self._lost_by_now(node) if node in self._overwritten else self.lost[node]

    # --- names and memory: what is changed in place ---

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self._latest or node in self._alias:
            node = self._alias[node] if node in self._alias else self._latest[node]
        return node

    def _inputs(self, value: Any) -> list[fx.Node]:
        items: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        return [self._now(item) for item in items if isinstance(item, fx.Node)]

    def _is_inplace(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self._module(node), "inplace", False) is True
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        if node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
            return True
        return node.op == "call_function" and getattr(node.target, "__name__", "").endswith("_")

    def _note_memory(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        if inputs and self._is_inplace(node):
            changed = inputs[0]
            for other in self._memory[changed]:
                if self._now(other) is not changed:
                    self._overwritten[other] = node
            self._latest[changed] = node
            self._memory[node] = self._memory[changed]
        elif inputs and self._is_view(node):
            self._memory[node] = self._memory[inputs[0]]
            if isinstance(self._module(node), nn.Identity):
                self._alias[node] = inputs[0]
        else:
            self._memory[node] = []
        self._memory[node].append(node)

    def _is_view(self, node: fx.Node) -> bool:
        module = self._module(node)
        key: Any = node.target if module is None else type(module)
        return key in VIEWS or (node.op != "call_method" and getattr(key, "__name__", "") in VIEWS)

    def _lost_by_now(self, node: fx.Node) -> str | None:
        if node in self._overwritten:
            return self.reason(self._overwritten[node], f"changes {node.name} in place under another name")
        return self.lost[node]

    # --- what rules ask for ---

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.create_node("call_function", function, args, name=self._name)

    def reason(self, node: fx.Node, why: str = "") -> str:
        """The operation, by name and kind, and what the matter is with it."""
        module = self._module(node)
        name, kind = (node.name, node.target) if module is None else (str(node.target), type(module))
        return f"{name} ({getattr(kind, '__name__', kind)}{why and f': {why}'})"

    def argument(self, node: fx.Node, position: int, name: str, default: Any) -> Any:
        """What the operation was given, or its module has."""
        if node.op == "call_module":
            return getattr(self._module(node), name, default)
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    def operand(self, node: fx.Node, position: int) -> Any:
        """One of the two operands of an arithmetic operation: a number or a node; None for anything else."""
        value = self.argument(node, position, ("input", "other")[position], None)
        if isinstance(value, fx.Node):
            return self._now(value)
        return value if isinstance(value, int | float) else None

    def is_constant(self, operand: Any) -> bool:
        return not isinstance(operand, fx.Node) or operand in self.constants

    def is_per_channel(self, x: fx.Node, constant: Any) -> bool:
        """Whether a constant that meets x in an arithmetic operation is one number, or one for each channel of x."""
        if not isinstance(constant, fx.Node):
            return True
        shape, known = self.constants[constant].shape, self.layouts[x]
        axes = known.axes if known else "?chw" if len(shape) > 2 else ""
        if known and len(shape) > len(axes):
            return False
        wide = [axis for axis, size in enumerate(reversed(shape), 1) if size != 1]
        return all(axis <= len(axes) and axes[-axis] == "c" for axis in wide)

    def formula(self, node: fx.Node, end: fx.Node | None = None) -> tuple[fx.Node, str]:
        """The value (`end`, or the earliest) that `node` is a function of, pixel by pixel, and that function of "x"."""
        rule = self._rules[node]
        if isinstance(rule, str) or not rule.curve or node is end:
            return node, "x"
        root, inner = self.formula(rule.needs[0], end)
        return root, rule.curve.replace("{}", inner)

    def map_layout(self, x: fx.Node) -> Layout | None:
        """The layout of what an operation on maps is given, or None if that is no map after all."""
        known = self.layouts[x]
        if known is None and (x.op == "placeholder" or self.lost[x]):
            return Layout("nchw", x)
        return known if known is not None and known.is_map else None

    def after_convolution(self, node: fx.Node, x: fx.Node, kernel: tuple[int, ...]) -> Layout | str:
        known = self.map_layout(x)
        if known is None:
            return self.reason(node, "of something that is not a map")
        return Layout("nc11" if known.axes == "nc11" and set(kernel) == {1} else "nchw", node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _note_constant(self, node: fx.Node) -> None:
        """Shapes of parameters, buffers, and what is made of them alone. On the device "meta", without effects."""
        if node.op == "get_attr":
            value: Any = self.modules[""]
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                self.constants[node] = torch.empty_like(value, device="meta")
        elif node.op in ("call_function", "call_method") and set(node.all_input_nodes) <= set(self.constants):
            if not node.all_input_nodes:
                return
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constants.__getitem__)
            try:
                call = getattr(args[0], str(node.target)) if node.op == "call_method" else None
                value = node.target(*args, **kwargs) if call is None else call(*args[1:], **kwargs)  # type: ignore[operator]
            except Exception:
                return
            if isinstance(value, Tensor):
                self.constants[node] = value

    # --- rules ---

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "placeholder":
            return self._input_rule()
        inputs = self.inputs[node] or [self._now(needed) for needed in node.all_input_nodes]
        if node.op in ("get_attr", "output") or not inputs:
            return self.reason(node)
        source = self._module(inputs[0])
        if node.target is operator.getitem and isinstance(source, Estimator):  # of (y, belief)
            return Carry([], lambda _: self.call(operator.getitem, inputs[0], 1), self._normalized_layout(inputs[0]))
        if node.target is not operator.getitem and self.pieces & set(inputs):
            return self.reason(node, "of several values in one")
        module = self._module(node)
        if isinstance(module, nn.Conv2d) and (_computes(module, nn.Conv2d) or type(module).__name__ == "Conv2dSame"):
            return self._conv_rule(node, str(node.target), module, inputs)
        if isinstance(module, nn.Linear) and _computes(module, nn.Linear):
            return linear(self, node, inputs[0], lambda: self._parameters(str(node.target), module))
        operation = self._operation(node, module)
        return self.reason(node) if operation is None else operation(self, node, inputs[0])

    def _operation(self, node: fx.Node, module: nn.Module | None) -> Operation | None:
        if module is not None:
            known = [cls for cls in type(module).__mro__ if cls in OPERATIONS and _computes(module, cls)]
            return OPERATIONS[known[0]] if known else BY_NAME.get(type(module).__name__)
        if node.target in OPERATIONS or node.op == "call_method":
            return OPERATIONS.get(node.target)
        return BY_NAME.get(getattr(node.target, "__name__", ""))

    def _input_rule(self) -> Rule:
        if self.input_belief is None:
            return "nothing: no normalizer before it, and the input's distribution is not given"
        given = self.input_belief
        if isinstance(given, fx.Node):
            return Carry([], lambda _: given)
        mean, var = given

        def constant(_: list[fx.Node]) -> fx.Node:
            return self.call(Belief, self.graph.get_attr(mean), self.graph.get_attr(var))

        return Carry([], constant)

    def _parameters(self, name: str, module: nn.Conv2d | nn.Linear) -> tuple[fx.Node, fx.Node | None]:
        bias = None if module.bias is None else self.graph.get_attr(f"{name}.bias")
        return self.graph.get_attr(f"{name}.weight"), bias

    def _conv_rule(self, node: fx.Node, name: str, module: nn.Conv2d, inputs: list[fx.Node]) -> Rule:
        after = self.after_convolution(node, inputs[0], tuple(module.kernel_size))
        if isinstance(after, str):
            return after

        def closed(beliefs: list[fx.Node]) -> fx.Node:
            if self.add_transition is not None:
                bias = None if module.bias is None else self.graph.get_attr(f"{name}.bias")
                transition = self.add_transition(name)
                return self.graph.create_node("call_module", transition, (beliefs[0], bias), name=self._name)
            return self.call(predict.conv, beliefs[0], *self._parameters(name, module), module.groups)

        if self.predictor == "closed":
            return Carry(inputs, closed, after)
        if module.padding_mode != "zeros":
            return (
                f"{name} (Conv2d with padding_mode={module.padding_mode!r}, which the sampling predictor does not draw)"
            )
        # A ReLU directly before the convolution acts on the sample.
        before = inputs[0]
        rectify = self.relu and before.op.startswith("call_") and self._operation(before, self._module(before)) is relu
        drawn_from = self.inputs[inputs[0]] if rectify else inputs

        def sampled(beliefs: list[fx.Node]) -> fx.Node:
            shared = self._single_row(drawn_from[0])
            noise = self.graph.call_module(self.add_noise(name, shared), (beliefs[0], node.args[0]))
            how = (module.stride, module.padding, module.dilation, module.groups, rectify)
            return self.call(sampled_conv, beliefs[0], noise, *self._parameters(name, module), *how)

        return Carry(drawn_from, sampled, after)

    def _single_row(self, node: fx.Node) -> bool:
        """Whether a belief has one row for all groups of all devices: the model's input's, or N(beta, gamma^2)."""
        rule = self._rules[node]
        if isinstance(rule, str):
            return False
        if rule.needs:
            return all(self._single_row(needed) for needed in rule.needs)
        if isinstance(self.input_belief, fx.Node) and node.op == "placeholder":
            return False
        source = self._module(self.inputs[node][0]) if self.inputs[node] else None
        return source is None or (isinstance(source, Estimator) and source.belief == "output")

    def _normalized_layout(self, call: fx.Node) -> Layout | None:
        """Of what a normalizer returns: of its input, or as the class of BatchNorm that it replaces demands."""
        (x, *_), kind = self.inputs[call], self.kinds[str(call.target)]
        if self.layouts[x] is not None or issubclass(kind, nn.BatchNorm2d):
            return self.layouts[x] or Layout("nchw", call)
        # BatchNorm1d takes [N, C, L] too; not from a linear layer of C outputs, unless L happened to be C.
        of = self.formula(x)[0]
        is_linear = isinstance(self._module(of), nn.Linear) or of.target is F.linear
        return Layout("nc", call) if is_linear and issubclass(kind, nn.BatchNorm1d) else None


def _computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of a class derived from `kind` computes the same."""
    return type(module).forward is kind.forward and "forward" not in module.__dict__
