"""Threading beliefs through a traced network: which belief reaches each normalizer, or which operation lost it."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from kalmannorm import belief as predict
from kalmannorm.norm import Estimator

# A rule says which nodes' beliefs an operation needs and how to write its own; a string says why it has none.
Rule = tuple[list[fx.Node], Callable[[list[fx.Node]], fx.Node]] | str

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_CONCAT_FUNCTIONS = {torch.cat, torch.concat, torch.concatenate}
# Unchanged by these (ALGORITHM 3): pooling, dropout, identity, copies.
_UNCHANGED_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.AlphaDropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_UNCHANGED_FUNCTIONS = {
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
    F.dropout2d,
}
_UNCHANGED_METHODS = {"contiguous", "clone", "float", "double"}
_INPLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class Threader:
    """Adds belief nodes to a traced graph, on demand and only where they are used.

    `predictor`: "closed" or "sampling"; `relu`: whether rectification changes a belief; `input_belief`: names of the
    buffers that hold the model input's belief, the node that is that belief, or None; `add_noise(convolution's name)`
    makes a noise module and returns its name; `add_transition(convolution's name)` a transition, None where
    convolutions' weights are theirs.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        predictor: str,
        relu: bool,
        input_belief: tuple[str, str] | fx.Node | None,
        add_noise: Callable[[str, bool], str],
        add_transition: Callable[[str], str] | None = None,
    ) -> None:
        self.graph, self.modules = graph, modules
        self.predictor, self.relu, self.input_belief, self.add_noise = predictor, relu, input_belief, add_noise
        self.add_transition = add_transition
        self.inputs: dict[fx.Node, list[fx.Node]] = {}  # what an operation's first argument holds when it runs
        self.lost: dict[fx.Node, str | None] = {}  # what lost the belief of a node's value; None if it has one
        self._rules: dict[fx.Node, Rule] = {}
        self._written: dict[fx.Node, fx.Node] = {}
        self._name = ""  # of the belief being written
        self._latest: dict[fx.Node, fx.Node] = {}  # a tensor changed in place -> the operation that changed it last
        self._alias: dict[fx.Node, fx.Node] = {}  # another name of a tensor -> the tensor
        for node in list(graph.nodes):
            first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
            self.inputs[node] = self._inputs(first)
            self._rules[node] = rule = self._rule(node)
            reasons = [rule] if isinstance(rule, str) else [self.lost[needed] for needed in rule[0]]
            self.lost[node] = next((why for why in reasons if why), None)
            if self._is_inplace(node) and self.inputs[node]:
                self._latest[self.inputs[node][0]] = node
            elif isinstance(self._module(node), nn.Identity):
                self._alias[node] = self.inputs[node][0]

    def write(self, node: fx.Node) -> fx.Node:
        """The node that computes the belief of `node`'s value, written right behind it on first use."""
        if node not in self._written:
            rule = self._rules[node]
            assert not isinstance(rule, str)
            beliefs = [self.write(needed) for needed in rule[0]]
            self._name = f"{node.name}_belief"
            with self.graph.inserting_before(node.next):
                self._written[node] = rule[1](beliefs)
        return self._written[node]

    # --- rules ---

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self._latest or node in self._alias:
            node = self._alias[node] if node in self._alias else self._latest[node]
        return node

    def _inputs(self, value: Any) -> list[fx.Node]:
        items: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        return [self._now(item) for item in items if isinstance(item, fx.Node)]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_inplace(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self._module(node), "inplace", False) is True
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        if node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
            return True
        return node.op == "call_function" and getattr(node.target, "__name__", "").endswith("_")

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.create_node("call_function", function, args, kwargs, name=self._name)

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "placeholder":
            return self._input_rule(node)
        inputs = self.inputs[node]
        if node.op == "call_module":
            return self._module_rule(node, inputs)
        if node.op == "call_function":
            return self._function_rule(node, inputs)
        if node.op == "call_method":
            if node.target in ("relu", "relu_"):
                return self._relu_rule(inputs)
            if node.target in ("add", "add_"):
                return self._add_rule(node)
            if node.target in _UNCHANGED_METHODS:
                return inputs, lambda beliefs: beliefs[0]
        return f"{node.name} ({node.op} {node.target})"

    def _input_rule(self, node: fx.Node) -> Rule:
        if self.input_belief is None:
            return "nothing: no normalizer before it, and the input's distribution is not given"
        given = self.input_belief
        if isinstance(given, fx.Node):
            return [], lambda _: given
        mean, var = given

        def constant(_: list[fx.Node]) -> fx.Node:
            return self._call(predict.Belief, self.graph.get_attr(mean), self.graph.get_attr(var))

        return [], constant

    def _module_rule(self, node: fx.Node, inputs: list[fx.Node]) -> Rule:
        name = str(node.target)
        module = self.modules[name]
        if isinstance(module, nn.Conv2d):
            return self._conv_rule(node, name, module, inputs)
        if isinstance(module, nn.Linear):
            return inputs, lambda beliefs: self._call(predict.linear, beliefs[0], *self._parameters(name, module))
        if isinstance(module, nn.ReLU):
            return self._relu_rule(inputs)
        if isinstance(module, _UNCHANGED_MODULES):
            return inputs, lambda beliefs: beliefs[0]
        return f"{name} ({type(module).__name__})"

    def _function_rule(self, node: fx.Node, inputs: list[fx.Node]) -> Rule:
        target: Any = node.target
        if target is operator.getitem and isinstance(self._module(inputs[0]), Estimator):
            return [], lambda _: self._call(operator.getitem, inputs[0], 1)  # (y, belief)
        if target in _RELU_FUNCTIONS:
            return self._relu_rule(inputs)
        if target in _ADD_FUNCTIONS:
            return self._add_rule(node)
        if target in _CONCAT_FUNCTIONS and self._argument(node, 1, "dim", 0) == 1:
            return inputs, lambda beliefs: self._call(predict.concat, beliefs)
        if target is F.pad and (sides := self._channel_padding(node)):
            return inputs, lambda beliefs: self._call(predict.pad_channels, beliefs[0], *sides)
        if target in _UNCHANGED_FUNCTIONS or (target is operator.getitem and _keeps_rows_and_channels(node.args[1])):
            return inputs, lambda beliefs: beliefs[0]
        return f"{node.name} ({getattr(target, '__name__', target)})"

    def _relu_rule(self, inputs: list[fx.Node]) -> Rule:
        return inputs, lambda beliefs: self._call(predict.relu, beliefs[0]) if self.relu else beliefs[0]

    def _add_rule(self, node: fx.Node) -> Rule:
        inputs = self._inputs(node.args)
        if len(inputs) != 2 or node.kwargs:
            return f"{node.name} (sum of something that is not two feature maps)"
        return inputs, lambda beliefs: self._call(predict.add, *beliefs)

    def _parameters(self, name: str, module: nn.Conv2d | nn.Linear) -> tuple[fx.Node, fx.Node | None]:
        bias = None if module.bias is None else self.graph.get_attr(f"{name}.bias")
        return self.graph.get_attr(f"{name}.weight"), bias

    def _conv_rule(self, node: fx.Node, name: str, module: nn.Conv2d, inputs: list[fx.Node]) -> Rule:
        def closed(beliefs: list[fx.Node]) -> fx.Node:
            if self.add_transition is not None:
                bias = None if module.bias is None else self.graph.get_attr(f"{name}.bias")
                transition = self.add_transition(name)
                return self.graph.create_node("call_module", transition, (beliefs[0], bias), name=self._name)
            return self._call(predict.conv, beliefs[0], *self._parameters(name, module), module.groups)

        if self.predictor == "closed":
            return inputs, closed
        if module.padding_mode != "zeros":
            return (
                f"{name} (Conv2d with padding_mode={module.padding_mode!r}, which the sampling predictor does not draw)"
            )
        # A ReLU directly before the convolution acts on the sample.
        rectify = self.relu and self._is_relu(inputs[0])
        drawn_from = self.inputs[inputs[0]] if rectify else inputs

        def sampled(beliefs: list[fx.Node]) -> fx.Node:
            shared = self._single_row(drawn_from[0])
            noise = self.graph.call_module(self.add_noise(name, shared), (beliefs[0], node.args[0]))
            how = (module.stride, module.padding, module.dilation, module.groups, rectify)
            return self._call(predict.sampled_conv, beliefs[0], noise, *self._parameters(name, module), *how)

        return drawn_from, sampled

    def _single_row(self, node: fx.Node) -> bool:
        """Whether a belief has one row for all groups of all devices: the model's input's, or N(beta, gamma^2)."""
        rule = self._rules[node]
        if isinstance(rule, str):
            return False
        if rule[0]:
            return all(self._single_row(needed) for needed in rule[0])
        if isinstance(self.input_belief, fx.Node) and node.op == "placeholder":
            return False
        source = self._module(self.inputs[node][0]) if self.inputs[node] else None
        return source is None or (isinstance(source, Estimator) and source.belief == "output")

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), nn.ReLU)
        return node.target in _RELU_FUNCTIONS or (node.op == "call_method" and node.target in ("relu", "relu_"))

    @staticmethod
    def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    def _channel_padding(self, node: fx.Node) -> tuple[int, int] | None:
        """(before, after) if the padding adds zero channels and nothing else, to a 4-D map."""
        pad = self._argument(node, 1, "pad", ())
        mode, value = self._argument(node, 2, "mode", "constant"), self._argument(node, 3, "value", None)
        if len(pad) == 6 and not any(pad[:4]) and mode == "constant" and not value:
            return pad[4], pad[5]
        return None


def _keeps_rows_and_channels(index: Any) -> bool:
    """x[:, :, ...]: subsampling of pixels."""
    return (
        isinstance(index, tuple)
        and len(index) > 2
        and all(i == slice(None) for i in index[:2])
        and all(isinstance(i, slice) for i in index)
    )
