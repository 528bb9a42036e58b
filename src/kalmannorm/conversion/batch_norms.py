"""BatchNorm layers that do more than normalize: trace their forwards with the new normalizer where they normalize."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.conversion.names import Scope
from kalmannorm.conversion.proxies import Untraceable
from kalmannorm.conversion.trace import Passed, Trace, Tracer
from kalmannorm.norm import contract

BATCH_NORM = inspect.signature(F.batch_norm)


class OwnCode(ValueError):
    """A BatchNorm layer does not normalize as its base class does."""


def has_forward_of_its_own(layer: nn.Module) -> bool:
    """Say whether a BatchNorm layer's forward is not torch's: it does more (timm's BatchNormAct2d), or otherwise."""
    return type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or "forward" in layer.__dict__


def normalize(x: Tensor) -> Tensor:
    """Mark, in the graph of such a layer, the place where it normalizes; never called."""
    raise NotImplementedError


def trace_layer(layer: _BatchNorm, name: str, training: bool) -> Trace:
    """Trace such a layer, with `normalize` in place of F.batch_norm or of its base class's forward.

    Raises OwnCode: the layer normalizes by code of its own. Untraceable: its forward has options, or branches on its
    input.
    """
    tracer = _LayerTracer(layer, name)
    mode = layer.training
    if len(inspect.signature(layer.forward).parameters) > 1:
        raise Untraceable("it has options")
    try:
        layer.training = training
        with tracer.reading_base_class():
            graph = tracer.trace(layer)
    except OwnCode:
        raise
    except Exception as error:
        raise Untraceable(str(error)) from error
    finally:
        layer.training = mode
    if not tracer.found:
        raise OwnCode(
            f"{name} ({type(layer).__name__}) is a BatchNorm layer that normalizes by code of its own, neither by "
            "F.batch_norm nor by its base class"
        )
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target == "num_batches_tracked":  # the new normalizer does the counting
            for user in list(node.users):
                graph.erase_node(user)
        if node.op == "get_attr" and not node.users:  # a moving average, which the new normalizer may not have
            graph.erase_node(node)
    return Trace(graph, {}, {}, {})


class _LayerTracer(Tracer):
    """Traces a BatchNorm layer's forward; `found` says whether it met the normalization."""

    def __init__(self, layer: _BatchNorm, name: str) -> None:
        super().__init__(Passed.nothing())
        self.layer, self.name, self.found = layer, name, False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        if kind == "call_function" and target is F.batch_norm:
            return self._normalization(BATCH_NORM.bind(*args, **kwargs).arguments)
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def _normalization(self, given: Scope) -> fx.Proxy:
        """Record `normalize` for a call of F.batch_norm. OwnCode: its arguments are not those of torch's BatchNorm."""
        layer = self.layer
        names = [key if getattr(layer, key) is not None else None for key in ("weight", "bias")]
        found = [getattr(getattr(given.get(key), "node", None), "target", None) for key in ("weight", "bias")]
        training = layer.training or layer.running_mean is None
        if found != names or given.get("training") is not training or given.get("eps") != layer.eps:
            raise OwnCode(f"{self.name} ({type(layer).__name__}) does not normalize as its base class, BatchNorm, does")
        return self._call(given["input"])

    def _call(self, x: object) -> fx.Proxy:
        self.found = True
        return super().create_proxy("call_function", normalize, (x,), {})

    @contextmanager
    def reading_base_class(self) -> Iterator[None]:
        """Record super().forward(x) as the normalization while the context lasts."""
        tracer = self
        classes: tuple[Any, ...] = (_BatchNorm, nn.SyncBatchNorm)
        originals = [cls.forward for cls in classes]
        try:
            for cls in classes:
                cls.forward = lambda self, input: tracer._call(input)
            yield
        finally:
            for cls, original in zip(classes, originals, strict=True):
                cls.forward = original


def trace_layers(
    layers: dict[str, _BatchNorm],
) -> tuple[dict[_BatchNorm, dict[str, Trace]], dict[str, str]]:
    """Trace the BatchNorm layers that do more than normalize.

    Return their traces, an empty dict for a layer that cannot be traced; and by name why other layers are left as they
    are: they normalize by code of their own, or have a __call__ of their own.
    """
    traces: dict[_BatchNorm, dict[str, Trace]] = {}
    left: dict[str, str] = {}
    for name, layer in layers.items():
        if contract.has_call_of_its_own(type(layer)):
            left[name] = f"{name} ({type(layer).__name__}) is a BatchNorm layer with a __call__ of its own"
        if layer in traces or name in left or not has_forward_of_its_own(layer):
            continue
        try:
            traces[layer] = {mode: trace_layer(layer, name, mode == "train") for mode in ("train", "eval")}
        except Untraceable:
            traces[layer] = {}
        except OwnCode as error:
            left[name] = str(error)
    return traces, left
