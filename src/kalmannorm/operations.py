"""The table in which Threader looks up what an operation of a traced network does to a belief."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kalmannorm.axes import (
    adaptive_average,
    adaptive_maximum,
    channel_shuffle,
    concatenation,
    division,
    expansion,
    flatten,
    interpolation,
    item,
    mean,
    narrow,
    padding,
    permutation,
    permute,
    pooling,
    reshaping,
    squeeze,
    transpose,
    unsqueeze,
    view,
)
from kalmannorm.norm import activations
from kalmannorm.norm import moments as predict
from kalmannorm.pixelwise import activation, arithmetic, convolution_function, fixed, linear_function, prelu, relu
from kalmannorm.rules import Operation, unchanged

Key = Any  # a class of modules, a function, or the name of a method


def _table(*entries: tuple[Operation, list[Key]]) -> dict[Key, Operation]:
    return {key: operation for operation, keys in entries for key in keys}


OPERATIONS: dict[Key, Operation] = _table(
    (unchanged, [nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, F.dropout, F.dropout2d, F.alpha_dropout]),
    (unchanged, ["contiguous", "clone", "float", "double", "to", "type_as", torch.clone]),
    (relu, [nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"]),
    (activation(activations.leaky_relu, negative_slope=0.01), [nn.LeakyReLU, F.leaky_relu, F.leaky_relu_]),
    (prelu, [nn.PReLU, F.prelu, torch.prelu]),
    (fixed(activations.clamp, 0.0, 6.0), [nn.ReLU6, F.relu6]),
    (activation(activations.clamp, min_val=-1.0, max_val=1.0), [nn.Hardtanh, F.hardtanh, F.hardtanh_]),
    (activation(activations.clamp, min=None, max=None), [torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"]),
    (fixed(activations.hardsigmoid), [nn.Hardsigmoid, F.hardsigmoid]),
    (fixed(activations.hardswish), [nn.Hardswish, F.hardswish]),
    (fixed(activations.sigmoid), [nn.Sigmoid, F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"]),
    (fixed(activations.tanh), [nn.Tanh, F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"]),
    (fixed(activations.silu), [nn.SiLU, F.silu]),
    (fixed(activations.gelu), [nn.GELU, F.gelu]),
    (fixed(activations.mish), [nn.Mish, F.mish]),
    (activation(activations.softplus, beta=1.0), [nn.Softplus, F.softplus]),
    (activation(activations.elu, alpha=1.0), [nn.ELU, F.elu, F.elu_]),
    (fixed(activations.selu), [nn.SELU, F.selu, F.selu_]),
    (arithmetic("+"), [operator.add, operator.iadd, torch.add, "add", "add_"]),
    (arithmetic("-"), [operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"]),
    (arithmetic("*"), [operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"]),
    (arithmetic("/"), [operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"]),
    (fixed(predict.scale, -1.0), [operator.neg, torch.neg, "neg", "neg_"]),
    (pooling, [nn.MaxPool2d, nn.AvgPool2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d]),
    (adaptive_average, [nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d]),
    (adaptive_maximum, [nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d]),
    (mean, [torch.mean, "mean"]),
    (interpolation, [nn.Upsample, nn.UpsamplingNearest2d, F.interpolate]),
    (padding, [F.pad, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d]),
    (reshaping(view), ["view", "reshape", torch.reshape]),
    (reshaping(flatten), [nn.Flatten, torch.flatten, "flatten"]),
    (reshaping(squeeze), [torch.squeeze, "squeeze"]),
    (reshaping(unsqueeze), [torch.unsqueeze, "unsqueeze"]),
    (permutation(permute), [torch.permute, "permute"]),
    (permutation(transpose), [torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"]),
    (expansion, ["expand", "expand_as"]),
    (concatenation, [torch.cat, torch.concat, torch.concatenate]),
    (division(predict.chunk, "chunks"), [torch.chunk, "chunk"]),
    (division(predict.split, "split_size_or_sections"), [torch.split]),
    (division(predict.split, "split_size"), ["split"]),
    (item, [operator.getitem]),
    (narrow, [torch.narrow, "narrow"]),
    (channel_shuffle, [nn.ChannelShuffle, F.channel_shuffle]),
    (convolution_function, [F.conv2d]),
    (linear_function, [F.linear]),
)

# Classes and functions of other libraries, known by their names. Skipping a branch at random is a dropout of images:
# unchanged, as dropout is.
BY_NAME: dict[str, Operation] = {
    **dict.fromkeys(("DropPath", "StochasticDepth", "stochastic_depth"), unchanged),
    **dict.fromkeys(("MaxPool2dSame", "AvgPool2dSame"), pooling),
}

# Their results may share memory with their input: what is changed in place under one name changes under the other.
VIEWS: set[Key] = {
    *(key for key, operation in OPERATIONS.items() if operation is unchanged and key not in ("clone", torch.clone)),
    *("view", "view_as", "reshape", "reshape_as", torch.reshape, nn.Flatten, torch.flatten, "flatten", "unflatten"),
    *(torch.unflatten, torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze", torch.permute, "permute"),
    *(torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims", torch.movedim, "movedim"),
    *("expand", "expand_as", torch.chunk, "chunk", torch.split, "split", torch.unbind, "unbind", operator.getitem),
    *(torch.narrow, "narrow", torch.select, "select", "unfold", "detach", getattr),
    *("DropPath", "StochasticDepth", "stochastic_depth"),
}
