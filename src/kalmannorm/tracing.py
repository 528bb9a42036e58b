"""From a module to its torch.fx graphs: what is traced, what runs as it is, and what is said where neither will do."""

import inspect
import operator
import os
import random
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Random skipping of residual branches, by the name that most code gives it: one operation, with a rule of its own.
_LEAVES = {"DropPath"}

# Augmented assignments, x += y, by their names in `operator`: tensors do them in place.
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod")

_batch_norm = inspect.signature(F.batch_norm)
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def trace(
    model: nn.Module, normalizers: set[str], inner: set[str], leaves: tuple[type[nn.Module], ...] = ()
) -> dict[str, fx.Graph]:
    """One graph for training and one for evaluation: tracing freezes `self.training`. Modes are left as they were.

    Args:
        normalizers: names of the layers that are replaced.
        inner: those of them that do more than normalize (`has_forward_of_its_own`).
        leaves: classes of modules that are not traced into.

    Raises ValueError, with the line of the user's code: a model that fx cannot trace; one that draws random numbers
    which tracing would freeze; a BatchNorm layer that normalizes by code of its own.
    """
    try:
        return _trace(model, normalizers, inner, leaves)
    except _Refused:
        raise
    except Exception as error:
        parts = _traceable_parts(model, normalizers, inner, leaves)
        if parts:
            example = f"model.{parts[0]} = kalmannorm.convert(model.{parts[0]}, ...)"
            advice = f"convert a part that it can trace ({', '.join(parts)}): {example}; or make that line a leaf"
        else:
            advice = "convert a submodule that it can trace, or make that line a leaf"
        advice += ": put it into a module without BatchNorm, or into a function marked by torch.fx.wrap"
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}: {error} ({_user_line(error)}); {advice}"
        ) from error


def _trace(
    model: nn.Module, normalizers: set[str], inner: set[str], leaves: tuple[type[nn.Module], ...]
) -> dict[str, fx.Graph]:
    modes = {module: module.training for module in model.modules()}
    drawn = _random_state()
    graphs = {}
    try:
        for mode in ("eval", "train"):
            model.train(mode == "train")
            graphs[mode] = _Tracer(normalizers, inner, leaves).trace(model, concrete_args=_frozen_arguments(model))
            if _random_state() != drawn:
                raise ValueError("it draws random numbers while it is traced, which would stay the same ever after")
    finally:
        _restore_random_state(drawn)
        for module, training in modes.items():
            module.training = training
    return graphs


def has_forward_of_its_own(layer: nn.Module) -> bool:
    """Whether a BatchNorm layer's class computes more than torch's, or something else (timm's BatchNormAct2d)."""
    return type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or "forward" in layer.__dict__


def _frozen_arguments(model: nn.Module) -> dict[str, Any]:
    """Options of the model's forward, which decide what there is to trace: they keep their defaults.

    The code asserts it, in fx's words ("... has been specialized to have value ...").
    """
    options = inspect.signature(type(model).forward).parameters.values()
    return {option.name: option.default for option in options if any(option.default is d for d in (None, True, False))}


def _traceable_parts(
    model: nn.Module, normalizers: set[str], inner: set[str], leaves: tuple[type[nn.Module], ...]
) -> list[str]:
    """Names of up to three of the largest submodules with normalizers that can be traced by themselves."""
    parts: list[str] = []
    waiting = [(name, child) for name, child in model.named_children()]
    while waiting and len(parts) < 3:
        path, module = waiting.pop(0)
        own, own_inner = (
            {n.removeprefix(f"{path}.") for n in names if n.startswith(f"{path}.")} for names in (normalizers, inner)
        )
        if not own:
            continue
        try:
            _trace(module, own, own_inner, leaves)
            parts.append(path)
        except Exception:
            waiting += [(f"{path}.{name}", child) for name, child in module.named_children()]
    return parts


def _user_line(error: Exception) -> str:
    """The last line of the traceback that is neither torch's nor ours."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_TORCH) and frame.filename != __file__
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "no line of the model's own"


class _Refused(ValueError):
    """A BatchNorm layer that is no such."""


class _InPlaceProxy(fx.Proxy):
    """fx traces `x += y` as x = x + y, a new tensor, which other names of x do not see: here it stays in place."""

    def _operate(self, name: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})


for _name in IN_PLACE:
    setattr(_InPlaceProxy, f"__{_name}__", partialmethod(_InPlaceProxy._operate, _name))


class _Tracer(fx.Tracer):
    """Leaves are torch's own modules, the normalizers, those of `leaves`, and what fx cannot trace and need not.

    Inner layers are traced, and where they normalize stands a call of the layer itself.
    """

    proxy_buffer_attributes = True  # what is made of a buffer is made of it in every forward, not once

    def __init__(self, normalizers: set[str], inner: set[str], leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.normalizers, self.inner, self.leaves = normalizers, inner, leaves
        self.holders = {name.rsplit(".", i)[0] for name in normalizers for i in range(name.count(".") + 1)}
        self.unread: dict[str, None] = {}  # inner layers that were called and have not normalized yet
        self.cached: dict[str, Any] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with self._reading_base_class():
            graph = super().trace(root, concrete_args)
        for name in self.unread:
            raise _Refused(
                f"{name} ({type(root.get_submodule(name)).__name__}) is a BatchNorm layer that normalizes by code of "
                "its own, neither by F.batch_norm nor by its base class"
            )
        counters = {f"{name}.num_batches_tracked" for name in self.inner}
        for node in list(graph.nodes):
            if node.op == "get_attr" and node.target in counters:  # the new normalizer counts for itself
                for user in [*node.users, node]:
                    graph.erase_node(user)
            elif node.op == "placeholder" and str(node.target).removesuffix("_1") in (concrete_args or {}):
                node.target = str(node.target).removesuffix("_1")  # fx has renamed it
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.inner:
            return False
        if module_qualified_name in self.normalizers or isinstance(m, self.leaves) or type(m).__name__ in _LEAVES:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # fx would make a plain dict of it
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self.cached = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            name = self.path_of_module(m)
        except NameError:  # made where it is used, nn.ReLU()(x)
            return forward(*args, **kwargs)
        if name in self.normalizers:
            args, kwargs = (*args, *kwargs.values()), {}  # layers have different names for their input
        if name in self.inner:
            self.unread[name] = None
        if self.is_leaf_module(m, name) or name in self.holders:
            return super().call_module(m, forward, args, kwargs)
        return self._traced_or_leaf(m, name, forward, args, kwargs)

    def _traced_or_leaf(self, m: nn.Module, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module without normalizers runs as it is where tracing fails, or would freeze its random numbers."""
        last = next(iter(reversed(self.graph.nodes)), None)
        stack, drawn = self.module_stack.copy(), _random_state()
        try:
            result = super().call_module(m, forward, args, kwargs)
            if _random_state() == drawn:
                return result
        except Exception:
            self.module_stack = stack
        _restore_random_state(drawn)
        for node in list(reversed(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)
        kept = set(self.graph.nodes)
        for key in [key for key, proxy in self.cached.items() if proxy.node not in kept]:
            del self.cached[key]
        return self.create_proxy("call_module", name, args, kwargs)

    # --- BatchNorm layers that do more than normalize ---

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        name = self.scope.module_path
        if name in self.inner and kind == "call_function" and target is F.batch_norm:
            return self._normalization(name, _batch_norm.bind(*args, **kwargs).arguments)
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def _normalization(self, name: str, given: dict[str, Any]) -> fx.Proxy:
        layer: Any = self.root.get_submodule(name)
        names = [f"{name}.{key}" if layer.affine else None for key in ("weight", "bias")]
        found = [getattr(getattr(given.get(key), "node", None), "target", None) for key in ("weight", "bias")]
        training = layer.training or layer.running_mean is None
        if found != names or given.get("training") is not training or given.get("eps") != layer.eps:
            raise _Refused(f"{name} ({type(layer).__name__}) does not normalize as its base class, BatchNorm, does")
        return self._call_of(name, given["input"])

    def _call_of(self, name: str, x: Any) -> fx.Proxy:
        self.unread.pop(name, None)
        return super().create_proxy("call_module", name, (x,), {})

    @contextmanager
    def _reading_base_class(self) -> Iterator[None]:
        """While it lasts, super().forward(x) in an inner layer stands for a call of the layer."""
        tracer = self
        classes: tuple[Any, ...] = (_BatchNorm, nn.SyncBatchNorm)
        originals = [cls.forward for cls in classes]

        def forward(self: nn.Module, input: Any) -> Any:
            return tracer._call_of(tracer.path_of_module(self), input)

        try:
            for cls in classes:
                cls.forward = forward
            yield
        finally:
            for cls, original in zip(classes, originals, strict=True):
                cls.forward = original


# --- the generators of torch and python ------------------------------------------------------------------------------


def _random_state() -> tuple[bytes, Any]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def _restore_random_state(state: tuple[bytes, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state[0]), dtype=torch.uint8))
    random.setstate(state[1])
