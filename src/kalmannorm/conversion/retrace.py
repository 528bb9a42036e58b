"""A converted model under torch.fx: in its graph layers that take beliefs are leaves, and beliefs stand beside values.

`torch.fx.symbolic_trace` and torchvision's feature extractors run the generated forwards with proxies; what they call
is recorded here. Nodes of beliefs have no place in a feature extractor's names: "layer2" is the features of layer2.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from kalmannorm.norm.belief import Args, Kwargs
from kalmannorm.norm.contract import TakesBeliefs, proxy_among, record_layer


def record(function: Callable[..., Any], *args: Any) -> fx.Proxy:
    """Return a node that calls the function, outside of the modules' names."""
    tracer = proxy_among(args).tracer
    return fx.Proxy(tracer.create_node("call_function", function, tracer.create_arg(args), {}), tracer)


def call(module: nn.Module, args: Args, kwargs: Kwargs, beliefs: tuple[Args, Kwargs]) -> Any:
    """(y, belief of y, ...) of a module that takes beliefs: a container's own forward is traced, a layer is a leaf."""
    if not isinstance(module, TakesBeliefs | _ConvNd | nn.Linear):
        return module(*args, **kwargs, beliefs=beliefs)
    pair = record_layer(module, args, {**kwargs, "beliefs": beliefs})
    y, belief = record(operator.getitem, pair, 0), record(operator.getitem, pair, 1)
    names = getattr(pair.tracer, "node_to_qualname", {})  # torchvision's: the layer's name is that of its y
    if pair.node in names:
        names[y.node] = names.pop(pair.node)
    return y, belief


def refuse(module: nn.Module | None, args: Args) -> None:
    """ValueError: torch.fx traces a module whose beliefs are not in its code, and would take them for constants."""
    if args and isinstance(args[0], fx.Proxy):
        raise ValueError(
            f"{type(module).__name__} cannot be traced by torch.fx once it is converted: what it does with beliefs "
            "depends on its input (conversion.untraced names such parts). Trace first and convert what comes "
            "out, as in kalmannorm.convert(create_feature_extractor(model, ...), ...); or take torch.export"
        )
