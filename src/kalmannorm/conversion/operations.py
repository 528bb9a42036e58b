"""The table of operations that a belief passes through, with their rules. A new one is a line here, and its rule."""

import operator
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kalmannorm.conversion import axes, pixelwise
from kalmannorm.conversion.rules import Rule, as_it_is, unchanged
from kalmannorm.norm import activations, moments

Key = Any  # a function, or a method's name


def _table(*entries: tuple[Rule, list[Key]]) -> dict[Key, Rule]:
    return {key: rule for rule, keys in entries for key in keys}


def _methods(*names: str) -> list[Key]:
    return [*names, *(f"{name}_" for name in names)]


FUNCTIONS: dict[Key, Rule] = _table(
    (unchanged, [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.clone]),
    (unchanged, ["contiguous", "clone", "float", "double", "to", "type_as"]),
    (pixelwise.relu, [F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"]),
    (pixelwise.activation(activations.leaky_relu, negative_slope=0.01), [F.leaky_relu, F.leaky_relu_]),
    (pixelwise.prelu, [F.prelu, torch.prelu]),
    (pixelwise.fixed(activations.clamp, 0.0, 6.0), [F.relu6]),
    (pixelwise.activation(activations.clamp, min_val=-1.0, max_val=1.0), [F.hardtanh, F.hardtanh_]),
    (
        pixelwise.activation(activations.clamp, min=None, max=None),
        [torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"],
    ),
    (pixelwise.fixed(activations.hardsigmoid), [F.hardsigmoid]),
    (pixelwise.fixed(activations.hardswish), [F.hardswish]),
    (pixelwise.fixed(activations.sigmoid), [F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"]),
    (pixelwise.fixed(activations.tanh), [F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"]),
    (pixelwise.fixed(activations.silu), [F.silu]),
    (pixelwise.fixed(activations.gelu), [F.gelu]),
    (pixelwise.fixed(activations.mish), [F.mish]),
    (pixelwise.activation(activations.softplus, beta=1.0), [F.softplus]),
    (pixelwise.activation(activations.elu, alpha=1.0), [F.elu, F.elu_]),
    (pixelwise.fixed(activations.selu), [F.selu, F.selu_]),
    (pixelwise.arithmetic("+"), [operator.add, operator.iadd, torch.add, "add", "add_"]),
    (pixelwise.arithmetic("-"), [operator.sub, operator.isub, torch.sub, torch.subtract, *_methods("sub", "subtract")]),
    (pixelwise.arithmetic("*"), [operator.mul, operator.imul, torch.mul, torch.multiply, *_methods("mul", "multiply")]),
    (
        pixelwise.arithmetic("/"),
        [operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide]
        + _methods("div", "divide", "true_divide"),
    ),
    (pixelwise.fixed(moments.scale, -1.0), [operator.neg, torch.neg, torch.negative, *_methods("neg", "negative")]),
    (axes.pooling, [F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d]),
    (axes.pooling, [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d]),
    (axes.pooling, [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]),
    (axes.adaptive_maximum, [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d]),
    (axes.mean, [torch.mean, "mean"]),
    (axes.interpolation, [F.interpolate]),
    (axes.padding, [F.pad]),
    (axes.reshape, ["view", "reshape", torch.reshape, torch.flatten, "flatten", torch.unflatten, "unflatten"]),
    (axes.reshape, ["view_as", "reshape_as"]),
    (axes.reshape, [torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"]),
    (axes.permute, [torch.permute, "permute"]),
    (axes.transpose, [torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"]),
    (axes.expansion, ["expand", "expand_as"]),
    (axes.concatenation, [torch.cat, torch.concat, torch.concatenate]),
    (axes.partition(moments.chunk, "chunks"), [torch.chunk, "chunk"]),
    (axes.partition(moments.split, "split_size_or_sections"), [torch.split]),
    (axes.partition(moments.split, "split_size"), ["split"]),
    (axes.item, [operator.getitem]),
    (axes.attribute, [getattr]),
    (axes.narrow, [torch.narrow, "narrow"]),
    (axes.channel_shuffle, [F.channel_shuffle]),
    (axes.pixel_shuffle, [F.pixel_shuffle]),
    (axes.pixel_unshuffle, [F.pixel_unshuffle]),
    (pixelwise.convolution, [F.conv1d, F.conv2d, F.conv3d]),
    (pixelwise.transposed_convolution, [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]),
    (pixelwise.linear, [F.linear]),
)

# Functions of other libraries, recognized by name. Skipping a branch at random is a dropout of images, and leaves the
# belief unchanged as dropout does.
BY_NAME: dict[str, Rule] = {"stochastic_depth": unchanged, "drop_path": unchanged}


def _of(function: Key, *attributes: str) -> tuple[Rule, tuple[str, ...]]:
    return FUNCTIONS[function], attributes


def _by_dimension(*names: str) -> list[type[nn.Module]]:
    return [getattr(nn, f"{name}{d}d") for name in names for d in (1, 2, 3)]


# A module has the rule of its function; the attributes named here become the arguments after the first.
MODULES: dict[type[nn.Module], tuple[Rule, tuple[str, ...]]] = {
    nn.Identity: (as_it_is, ()),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), (unchanged, ())),
    nn.ReLU: _of(F.relu),
    nn.LeakyReLU: _of(F.leaky_relu, "negative_slope"),
    nn.PReLU: _of(F.prelu, "weight"),
    nn.ReLU6: _of(F.relu6),
    nn.Hardtanh: _of(F.hardtanh, "min_val", "max_val"),
    nn.Hardsigmoid: _of(F.hardsigmoid),
    nn.Hardswish: _of(F.hardswish),
    nn.Sigmoid: _of(F.sigmoid),
    nn.SiLU: _of(F.silu),
    nn.GELU: _of(F.gelu),
    nn.Tanh: _of(F.tanh),
    nn.ELU: _of(F.elu, "alpha"),
    nn.SELU: _of(F.selu),
    nn.Mish: _of(F.mish),
    nn.Softplus: _of(F.softplus, "beta"),
    **dict.fromkeys(_by_dimension("MaxPool", "AvgPool", "AdaptiveAvgPool"), (axes.pooling, ())),
    **dict.fromkeys(_by_dimension("AdaptiveMaxPool"), (axes.adaptive_maximum, ())),
    nn.Upsample: (lambda o: axes.interpolation(o._replace(args=(o.x, None, None, o.args[1]), kwargs={})), ("mode",)),
    nn.UpsamplingNearest2d: (axes.pooling, ()),
    **dict.fromkeys(_by_dimension("ZeroPad"), _of(F.pad, "padding")),
    **dict.fromkeys(
        _by_dimension("ConstantPad"),
        (
            lambda o: axes.padding(o._replace(args=(o.x, o.args[1], "constant", o.args[2]), kwargs={})),
            ("padding", "value"),
        ),
    ),
    **dict.fromkeys(_by_dimension("ReflectionPad", "ReplicationPad", "CircularPad"), (axes.pooling, ())),
    nn.Flatten: _of("flatten"),
    nn.Unflatten: _of("unflatten"),
    nn.PixelShuffle: _of(F.pixel_shuffle, "upscale_factor"),
    nn.PixelUnshuffle: _of(F.pixel_unshuffle, "downscale_factor"),
    nn.ChannelShuffle: _of(F.channel_shuffle, "groups"),
}
MODULES_BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(("DropPath", "StochasticDepth"), unchanged),
    **dict.fromkeys(("MaxPool2dSame", "AvgPool2dSame"), axes.pooling),
}


# Functions of a map and a weight: their rules hold only for a weight that is computed from parameters alone.
WEIGHTED: set[Key] = {
    key
    for key, rule in FUNCTIONS.items()
    if rule in (pixelwise.convolution, pixelwise.transposed_convolution, pixelwise.linear)
}


def rule_of(target: Key) -> Rule | None:
    """Return the rule of a function, or of the method with this name; None if there is none."""
    try:
        found = FUNCTIONS.get(target)
    except TypeError:  # not hashable
        return None
    if found is None and not isinstance(target, str):
        found = BY_NAME.get(getattr(target, "__name__", ""))
    return found


def rule_of_class(cls: type[nn.Module]) -> tuple[Rule | None, tuple[str, ...]]:
    """Return the rule of a module class, or None, and the names of the attributes that the rule gets as arguments."""
    cls = class_of_rule(cls)
    return MODULES.get(cls) or (MODULES_BY_NAME.get(cls.__name__), ())


def class_of_rule(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the base class in MODULES that `cls` computes the same as; if there is none, `cls` itself."""
    return next((base for base in cls.__mro__ if base in MODULES and _computes_the_same(cls, base)), cls)


def _computes_the_same(cls: Any, base: Any) -> bool:
    return all(getattr(cls, name) is getattr(base, name) for name in ("forward", "__call__", "_call_impl"))


# Operations whose result may share memory with their input: an in-place change of one then changes the other too.
VIEWS: set[Key] = {
    *(key for key, rule in FUNCTIONS.items() if rule is unchanged and key not in ("clone", torch.clone)),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Flatten),
    *("view", "view_as", "reshape", "reshape_as", torch.reshape, torch.flatten, "flatten", "unflatten"),
    *(torch.unflatten, torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze", torch.permute, "permute"),
    *(torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims", torch.movedim, "movedim"),
    *("expand", "expand_as", torch.chunk, "chunk", torch.split, "split", torch.unbind, "unbind", operator.getitem),
    *(torch.narrow, "narrow", torch.select, "select", "unfold", "detach", getattr),
    *("DropPath", "StochasticDepth", "stochastic_depth", "drop_path"),
}

# Formulas of functions that act pixel by pixel: by them a product x * f(x) is recognized (pixelwise.PRODUCTS).
CURVES: dict[Key, str] = {
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_", nn.Sigmoid), "sigmoid({})"),
    **dict.fromkeys((F.hardsigmoid, nn.Hardsigmoid), "hardsigmoid({})"),
    **dict.fromkeys((F.softplus, nn.Softplus), "softplus({})"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_", nn.Tanh), "tanh({})"),
    **dict.fromkeys((F.relu6, nn.ReLU6), "relu6({})"),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU), "relu({})"),
    **dict.fromkeys((nn.Identity, nn.Dropout, F.dropout), "{}"),
    **{
        key: f"other{i}({{}})"
        for i, key in enumerate(
            (nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.SELU, nn.Mish, nn.Hardtanh, nn.PReLU)
            + (F.silu, F.gelu, F.leaky_relu, F.hardswish, F.elu, F.selu, F.mish, F.hardtanh)
        )
    },
}
SIGNS: dict[Key, str] = {key: rule.sign for key, rule in FUNCTIONS.items() if hasattr(rule, "sign")}


def sign_of(function: Key, name: str) -> str:
    """Return the sign of an arithmetic function, or of the method with this name; "" for any other."""
    return SIGNS.get(function) or SIGNS.get(name, "")


def formula_of(function: Key, name: str, others: tuple[Any, ...]) -> str:
    """Return the formula of a call of a function, or of the method with this name, on its first argument; "" if it does
    not act pixel by pixel. `others`: the arguments after the first."""
    return with_parameters(CURVES.get(function) or CURVES.get(name, ""), others)


def formula_with(sign: str, constant: Any, first: bool = False) -> str:
    """Return the formula of arithmetic with a constant, a number or a constant's name; `first`: it stands before the
    feature. Return "" if it is neither."""
    if not isinstance(constant, int | float | str):
        return ""
    written = constant if isinstance(constant, str) else f"{constant:g}"
    return f"{sign}({written},{{}})" if first and sign in "-/" else f"{sign}({{}},{written})"


def with_parameters(curve: str, given: Any) -> str:
    """Put the numbers that a function was given beside the feature into its formula, but no 1: softplus's default."""
    extra = "".join(f",{value:g}" for value in given if type(value) in (int, float) and value != 1)
    return curve.replace("({})", f"({{}}{extra})") if extra else curve


def make_dict(keys: tuple[Any, ...], values: tuple[Any, ...]) -> "OrderedDict[Any, Any]":
    """Build the OrderedDict that a forward returns; fx itself would put a plain dict into the graph."""
    return OrderedDict(zip(keys, values, strict=True))


def same_items(keys: tuple[Any, ...], beliefs: tuple[Any, ...]) -> dict[Any, Any]:
    """Build the beliefs that belong to a dictionary's values, by the same keys."""
    return dict(zip(keys, beliefs, strict=True))
