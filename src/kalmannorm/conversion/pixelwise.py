"""Rules of activations, arithmetic of two values, convolutions and linear layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kalmannorm.conversion.rules import Found, Operation, Rule, lift, on_channels, shortened, with_axes
from kalmannorm.norm import activations, moments
from kalmannorm.norm.belief import Belief, Carried

# --- one operand ------------------------------------------------------------------------------------------------------


def relu(o: Operation) -> Found:
    """Rectify the belief; do nothing with relu=False; leave it to the next convolution under the sampling predictor."""
    belief = o.belief
    if not isinstance(belief, Carried) or belief.relu == "closed":
        return lift(moments.relu, belief)
    if belief.relu == "ignored":
        return belief
    return moments.relu_applied(belief)._replace(relu="pending")


def activation(function: Callable[..., Belief], **parameters: Any) -> Rule:
    """Make a rule that applies `function` with the operation's arguments after the first.

    `parameters`: their names in order of position, with their defaults.
    """

    def rule(o: Operation) -> Found:
        given = [o.argument(i, name, default) for i, (name, default) in enumerate(parameters.items(), 1)]
        if any(isinstance(value, Tensor) for value in given):
            return "its parameters are computed"
        return lift(function, o.belief, *given)

    return rule


def fixed(function: Callable[..., Belief], *given: float) -> Rule:
    """Make a rule that applies `function` with these numbers, whatever else the operation was given."""
    return lambda o: lift(function, o.belief, *given)


def prelu(o: Operation) -> Found:
    return on_channels(activations.leaky_relu, o.belief, o.argument(1, "weight"))


# --- two operands -----------------------------------------------------------------------------------------------------

# The activations x f(x) by the formula of f. As a product of independent factors their moments would be wrong.
PRODUCTS: dict[str, Callable[..., Belief]] = {
    "sigmoid(x)": activations.silu,
    "hardsigmoid(x)": activations.hardswish,
    "/(relu6(+(x,3)),6)": activations.hardswish,
    "*(relu6(+(x,3)),0.166667)": activations.hardswish,
    "tanh(softplus(x))": activations.mish,
}
_OF_TWO = {"+": moments.add, "-": moments.subtract, "*": moments.multiply}


def arithmetic(sign: str) -> Rule:
    """Make the rule of `+`, `-`, `*` or `/`, of two features or of a feature and a constant."""

    def rule(o: Operation) -> Found:
        a, b = o.argument(0, "input"), o.argument(1, "other")
        of_a, of_b = o.belief_of(0, "input"), o.belief_of(1, "other")
        if sign == "+" and isinstance(o.y, list | tuple):
            return [*_each(a, of_a), *_each(b, of_b)]
        if more := set(o.kwargs) - {"input", "other"}:
            return "with weights" if more == {"alpha"} else f"with {', '.join(sorted(more))}"
        if o.kind == "constant second" or isinstance(b, int | float):
            return _with_constant(sign, a, of_a, b, False)
        if o.kind == "constant first" or isinstance(a, int | float):
            return _with_constant(sign, b, of_b, a, True)
        if o.kind.startswith("product"):
            _, formula, first = o.kind.split(" ")
            return lift(PRODUCTS[formula], of_a if first == "0" else of_b)
        return _of_two(o, sign, a, b, of_a, of_b)

    rule.sign = sign  # type: ignore[attr-defined]
    return rule


def _each(values: Any, beliefs: Any) -> Any:
    return beliefs if isinstance(beliefs, list | tuple) else [None] * len(values)


def _with_constant(sign: str, x: Any, belief: Any, constant: Any, first: bool) -> Found:
    if belief is None or not isinstance(x, Tensor):
        return ""
    if sign == "/" and first:
        return "divides a constant by a feature"
    carried = with_axes(belief, x.dim())
    if not _is_per_channel(constant, carried.axes):
        return "with a constant that is not one number per channel"
    if sign == "+":
        return shortened(lift(moments.shift, carried, constant))
    if sign == "*":
        return shortened(lift(moments.scale, carried, constant))
    if sign == "-" and first:
        return shortened(lift(moments.shift, lift(moments.scale, carried, -1.0), constant))
    if sign == "-":
        return shortened(lift(moments.shift, carried, -constant))
    if not isinstance(constant, Tensor) and constant == 0:
        return "divides by zero"
    return shortened(lift(moments.scale, carried, 1 / constant))


def _is_per_channel(constant: Any, axes: str) -> bool:
    """Say whether a constant is a single number, or has one for each channel of a value with these axes."""
    if not isinstance(constant, Tensor):
        return isinstance(constant, int | float)
    wide = [i for i, size in enumerate(reversed(constant.shape), 1) if size != 1]
    return all(i <= len(axes) and axes[-i] == "c" for i in wide)


def _of_two(o: Operation, sign: str, a: Any, b: Any, of_a: Any, of_b: Any) -> Found:
    if of_a is None or of_b is None or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return ""
    if sign == "/":
        return "divides by a feature"
    if o.kind == "dependent":
        return "of a feature with a function of itself, which is not independent of it"
    first, second = with_axes(of_a, a.dim()), with_axes(of_b, b.dim())
    if first.axes != second.axes:
        return "of values whose axes differ"
    return shortened(first._replace(belief=_OF_TWO[sign](first.belief, second.belief)))


# --- convolutions and linear layers -----------------------------------------------------------------------------------


def convolution(o: Operation) -> Found:
    """Predict F.conv* in closed form (under either predictor), if the weight is computed from parameters alone."""
    if o.kind == "computed":
        return "its weight is computed from features"
    weight, bias, groups = o.argument(1, "weight"), o.argument(2, "bias"), o.argument(6, "groups", 1)
    return of_map(moments.conv, o.belief, o.y, weight, bias, groups)


def transposed_convolution(o: Operation) -> Found:
    """Predict F.conv_transpose* in closed form (under either predictor), if the weight is computed from parameters."""
    if o.kind == "computed":
        return "its weight is computed from features"
    weight, bias, pixels = o.argument(1, "weight"), o.argument(2, "bias"), o.y.dim() - 2
    stride, dilation = (o.argument(i, name, 1) for i, name in ((3, "stride"), (7, "dilation")))
    stride, dilation = (value if isinstance(value, tuple | list) else (value,) * pixels for value in (stride, dilation))
    groups = o.argument(6, "groups", 1)
    return of_map(moments.conv_transpose, o.belief, o.y, weight, bias, tuple(stride), groups, tuple(dilation))


def of_map(function: Callable[..., Belief], belief: Any, y: Tensor, weight: Tensor, *rest: Any) -> Found:
    """Apply `function` to the belief of a convolution's input, if that is a batch of maps with channels in axis 1."""
    if belief is None:
        return ""
    if y.dim() != weight.dim() or (isinstance(belief, Carried) and belief.axes):
        return "of something that is not a map"
    return lift(function, belief, weight, *rest)


def linear(o: Operation) -> Found:
    """Predict F.linear over the last axis, if it holds the channels: [N, C], or [N, H, W, C] as a 1x1 convolution."""
    if o.kind == "computed":
        return "its weight is computed from features"
    carried = o.belief_with_axes()
    if carried is None:
        return ""
    if carried.axes[-1] != "c" or carried.axes.count("c") > 1:
        return "over an axis that is not the channels"
    return shortened(lift(moments.linear, carried, o.argument(1, "weight"), o.argument(2, "bias")))
