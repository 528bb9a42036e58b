"""Rules of what acts on every pixel by itself, or on two values, and of linear layers."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kalmannorm.norm import activations
from kalmannorm.norm import moments as predict
from kalmannorm.rules import Carry, Operation, Rule, as_it_is

if TYPE_CHECKING:
    from kalmannorm.thread import Threader

# --- one operand ------------------------------------------------------------------------------------------------------


def relu(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    return _elementwise(t, x, predict.relu) if t.relu else Carry([x], as_it_is, t.layouts[x], "relu({})")


def activation(moments: Callable[..., Any], **parameters: Any) -> Operation:
    """`moments`, with what the operation was given for these parameters (in this order), or their defaults."""

    def rule(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
        given = [t.argument(node, i, name, parameters[name]) for i, name in enumerate(parameters, 1)]
        if any(isinstance(value, fx.Node) for value in given):
            return t.reason(node, "its parameters are computed")
        return _elementwise(t, x, moments, *given)

    return rule


def fixed(moments: Callable[..., Any], *given: float) -> Operation:
    return lambda t, node, x: _elementwise(t, x, moments, *given)


def _elementwise(t: "Threader", x: fx.Node, moments: Callable[..., Any], *given: Any) -> Carry:
    written = "".join(f",{value:g}" if isinstance(value, int | float) else f",{value}" for value in given)
    curve = f"{moments.__name__}({{}}{written})"
    return Carry([x], lambda beliefs: t.call(moments, beliefs[0], *given), t.layouts[x], curve)


def prelu(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    known = t.layouts[x]
    if known is not None and known.axis(1) != "c":
        return t.reason(node, "along another axis than the channels")
    if node.op == "call_function" and node.args[1] not in t.constants:
        return t.reason(node, "its slope is computed")

    def write(beliefs: list[fx.Node]) -> fx.Node:
        slope = node.args[1] if node.op == "call_function" else t.graph.get_attr(f"{node.target}.weight")
        return t.call(activations.leaky_relu, beliefs[0], slope)

    return Carry([x], write, known, f"prelu({{}},{node})")


# --- two operands -----------------------------------------------------------------------------------------------------

# x f(x), of one and the same x: the product of independent factors would be something else.
_PRODUCTS: dict[str, Callable[..., Any]] = {
    "sigmoid(x)": activations.silu,
    "hardsigmoid(x)": activations.hardswish,
    "scale(clamp(shift(x,3),0,6),0.166667)": activations.hardswish,
    "tanh(softplus(x,1))": activations.mish,
}
_OF_TWO = {"+": predict.add, "-": predict.subtract, "*": predict.multiply}


def arithmetic(sign: str) -> Operation:
    def rule(t: "Threader", node: fx.Node, _: fx.Node) -> Rule:
        a, b = t.operand(node, 0), t.operand(node, 1)
        if set(node.kwargs) - {"input", "other"} or a is None or b is None:
            return t.reason(node, "with weights, or of something else than two values")
        if t.is_constant(b):
            return t.reason(node, "of constants") if t.is_constant(a) else _with_constant(t, node, sign, a, b)
        if t.is_constant(a):
            if sign == "/":
                return t.reason(node, "divides a constant by a feature")
            return _with_constant(t, node, "c-" if sign == "-" else sign, b, a)
        return _of_two(t, node, sign, a, b)

    return rule


def _with_constant(t: "Threader", node: fx.Node, sign: str, x: fx.Node, constant: Any) -> Rule:
    if not t.is_per_channel(x, constant) or (sign == "/" and constant == 0):
        return t.reason(node, "with a constant that is not one number per channel")

    def write(beliefs: list[fx.Node]) -> fx.Node:
        value = constant
        if sign == "c-":
            return t.call(predict.shift, t.call(predict.scale, beliefs[0], -1.0), value)
        if sign == "-":
            value = t.call(operator.neg, value) if isinstance(value, fx.Node) else -value
        if sign == "/":
            value = t.call(torch.reciprocal, value) if isinstance(value, fx.Node) else 1 / value
        return t.call(predict.shift if sign in "+-" else predict.scale, beliefs[0], value)

    if isinstance(constant, fx.Node) or sign == "c-":
        curve = f"{sign}({{}},{constant})"
    else:
        number = {"-": lambda c: -c, "/": lambda c: 1 / c}.get(sign, lambda c: c)(constant)
        curve = f"{'shift' if sign in '+-' else 'scale'}({{}},{number:g})"
    return Carry([x], write, t.layouts[x], curve)


def _of_two(t: "Threader", node: fx.Node, sign: str, a: fx.Node, b: fx.Node) -> Rule:
    if sign == "/":
        return t.reason(node, "divides by a feature")
    for one, other in ((a, b), (b, a)):
        root, function = t.formula(other, one)
        if root is one and sign == "*" and function in _PRODUCTS:
            return _elementwise(t, one, _PRODUCTS[function])
    if t.formula(a)[0] is t.formula(b)[0]:
        return t.reason(node, "of a feature with a function of itself, which is not independent of it")
    both = [t.layouts[one] for one in (a, b)]
    kinds = {one and one.axes for one in both}
    if len(kinds) > 1 and kinds != {"nchw", "nc11"} and not (t.lost[a] or t.lost[b]):
        return t.reason(node, "of values whose axes differ or are not known")
    larger = next((one for one in both if one and one.axes == "nchw"), both[0])
    return Carry([a, b], lambda beliefs: t.call(_OF_TWO[sign], *beliefs), larger)


# --- convolutions and linear layers as functions, of parameters or what is made of them -------------------------------


def convolution_function(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    """In closed form under either predictor."""
    weight, bias = t.argument(node, 1, "weight", None), t.argument(node, 2, "bias", None)
    groups = t.argument(node, 6, "groups", 1)
    if weight not in t.constants or not (bias is None or bias in t.constants):
        return t.reason(node, "its weight is computed from features")
    after = t.after_convolution(node, x, tuple(t.constants[weight].shape[2:]))
    if isinstance(after, str):
        return after
    return Carry([x], lambda beliefs: t.call(predict.conv, beliefs[0], weight, bias, groups), after)


def linear_function(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    weight, bias = t.argument(node, 1, "weight", None), t.argument(node, 2, "bias", None)
    if weight not in t.constants or not (bias is None or bias in t.constants):
        return t.reason(node, "its weight is computed from features")
    return linear(t, node, x, lambda: (weight, bias))


def linear(t: "Threader", node: fx.Node, x: fx.Node, parameters: Callable[[], tuple[Any, Any]]) -> Rule:
    """Over the last axis: of [N, C], or of [N, H, W, C] as a convolution with a kernel of one."""
    known = t.layouts[x]
    if not (known.axes.endswith("c") if known else x.op == "placeholder"):
        return t.reason(node, "over an axis that may not be the channels")
    return Carry([x], lambda beliefs: t.call(predict.linear, beliefs[0], *parameters()), known)
