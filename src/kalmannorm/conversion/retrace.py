"""Trace a converted model by torch.fx: layers that take beliefs become leaves, and beliefs stand beside values.

`torch.fx.symbolic_trace` and torchvision's feature extractors run the generated forwards with proxies, and this module
records what the forwards call. Nodes of beliefs stay out of a feature extractor's names, so that "layer2" remains the
name of layer2's features.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from kalmannorm.norm.belief import Args, Kwargs
from kalmannorm.norm.contract import TakesBeliefs, proxy_among, record_layer


def record(function: Callable[..., Any], *args: Any) -> fx.Proxy:
    """Add a call of the function to the graph, outside of the modules' names, and return its proxy."""
    tracer = proxy_among(args).tracer
    return fx.Proxy(tracer.create_node("call_function", function, tracer.create_arg(args), {}), tracer)


def call(module: nn.Module, args: Args, kwargs: Kwargs, beliefs: tuple[Args, Kwargs]) -> Any:
    """Call a module that takes beliefs on proxies and return (y, belief of y, ...): a container's forward is traced, a
    layer becomes a leaf."""
    if not isinstance(module, TakesBeliefs | _ConvNd | nn.Linear):
        return module(*args, **kwargs, beliefs=beliefs)
    pair = record_layer(module, args, {**kwargs, "beliefs": beliefs})
    y, belief = record(operator.getitem, pair, 0), record(operator.getitem, pair, 1)
    names = getattr(pair.tracer, "node_to_qualname", {})  # torchvision's tracer: the layer's name belongs to y
    if pair.node in names:
        names[y.node] = names.pop(pair.node)
    return y, belief


def refuse(module: nn.Module | None, args: Args) -> None:
    """Raise ValueError if torch.fx traces a module whose code does not compute its beliefs: the graph would freeze them
    as constants."""
    if args and isinstance(args[0], fx.Proxy):
        raise ValueError(
            f"{type(module).__name__} cannot be traced by torch.fx once it is converted: what it does with beliefs "
            "depends on its input (conversion.untraced names such parts). Trace first and convert what comes "
            "out, as in kalmannorm.convert(create_feature_extractor(model, ...), ...); or take torch.export"
        )
