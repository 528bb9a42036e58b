"""The methods of a module that takes beliefs (belief.py): its call, and hooks that see no beliefs.

In a forward whose beliefs are followed by tensor (conversion/flow.py) a plain call finds the beliefs of its arguments.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules import module as module_hooks
from torch.utils._pytree import tree_map_only

from kalmannorm.norm.belief import Args, Estimated, Kwargs, Returned, pick
from kalmannorm.norm.checkpoints import is_within
from kalmannorm.norm.groups import is_transformed

NORMALIZER = "_normalizer"  # attribute that marks a layer which convert put in
# A converted model's attribute with a dict about the conversion, and keys in this: the arguments of the first call (on
# the meta device), whether the model returns a belief, and the mean and variance of the input's belief.
MARK, SEEN, RETURNS, GIVEN = "_conversion", "seen", "returns_belief", "given"


class _Running(threading.local):
    """State of the forward that a thread runs (DataParallel has several threads).

    Attributes:
        flow: the flow.Flow that follows beliefs through it, or None.
        idle: whether no belief is used, so that normalizers return none.
    """

    flow: Any = None
    idle = False


running = _Running()


# While a forward runs that reads `layer.__class__`, this holds `class_of`, to be used in place of type().
lent: dict[str, Callable[[object], type]] = {}


def _set_class(layer: Any, cls: Any) -> None:
    """Set a layer's class; a class that FSDP derived from the original is derived anew from the layer's own.

    FSDP caches its classes by their base, and a converted layer's class compares equal to the original.
    """
    own, made = type(layer), vars(type(layer)).get("converted")
    if made is not None and "converted" not in vars(cls) and any(base is made.original for base in cls.__bases__):
        bases = tuple(own if base is made.original else base for base in cls.__bases__)
        cls = type(cls.__name__, bases, {key: value for key, value in vars(cls).items() if key != "__dict__"})
    object.__dict__["__class__"].__set__(layer, cls)


own_class = property(lambda self: lent.get("class_of", type)(self), _set_class)


def unless_idle(belief: Any) -> Any:
    """Return the belief, or None while no belief is used."""
    return None if running.idle else belief


def proxy_among(values: Any) -> Any:
    """Return a torch.fx.Proxy in a structure of arguments, a sign that torch.fx traces the caller; else None."""
    found: list[Any] = []
    map_aggregate(values, lambda value: found.append(value) if isinstance(value, fx.Proxy) else None)
    return found[0] if found else None


def record_layer(layer: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    """Record a layer's call in the graph as a leaf, like those of torch's own layers, and return its proxy."""
    tracer = proxy_among((args, kwargs)).tracer
    path = tracer.path_of_module(layer)
    return tracer.call_module(layer, lambda *a, **k: tracer.create_proxy("call_module", path, a, k), args, kwargs)


def is_traced() -> bool:
    """Say whether torch.export or torch.jit.trace is tracing.

    A trace would keep unused operations, among them the sampling predictor's draws, which ONNX does not have.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _may_drop_beliefs(model: nn.Module) -> bool:
    """Say whether a converted model should drop beliefs that nothing uses.

    A trace would keep them, vmap cannot draw, and inference may have weights that can only be convolved with (quantized
    ones) and is faster without. With gradients beliefs stay: DDP waits for those of the parameters behind them.
    """
    if is_traced() or is_transformed():
        return True
    return not (model.training or torch.is_grad_enabled() or torch.compiler.is_compiling())


def _call_without_unused_beliefs(model: nn.Module, call: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call a converted model, without beliefs if all its normalizers use moving averages and it returns no belief."""
    outer, running.idle = running.idle, not model.__dict__[MARK][RETURNS] and not _measures(model)
    try:
        return call(model, *args, **kwargs)
    finally:
        running.idle = outer


def _measures(model: nn.Module) -> bool:
    """Say whether any normalizer that takes beliefs measures its input, instead of using moving averages."""
    return any(isinstance(m, TakesBeliefs) and not getattr(m, "uses_moving", False) for m in model.modules())


def _is_called_by_itself(part: nn.Module, args: Args) -> bool:
    """Say whether a part of a model is called by itself, on features that other parts computed, and measures them."""
    if MARK in part.__dict__ or torch.compiler.is_compiling():
        return False
    tensors = [value for value in args if issubclass(type(value), Tensor)]  # isinstance is also true for some proxies
    computed = any(value.grad_fn is not None for value in tensors) or is_within()
    return computed and _measures(part)


def has_call_of_its_own(cls: type[nn.Module]) -> bool:
    """Say whether a class has a __call__ or _call_impl that is neither torch's nor ours, and may do more than hooks and
    forward."""
    pairs = (cls.__call__, nn.Module.__call__), (cls._call_impl, nn.Module._call_impl)
    own = [call for call, of_torch in pairs if call is not of_torch]
    return not all(call.__module__.startswith(("torch.", "kalmannorm.")) for call in own)


def methods(base: type[nn.Module]) -> dict[str, Any]:
    """Return the methods of a class that takes beliefs and is derived from `base`."""
    own_call = has_call_of_its_own(base)  # such a __call__ knows nothing of beliefs

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A forward that was set after the conversion, on the class or on the instance, knows nothing of beliefs.
        own = type(self).forward
        replaced = own_call or (
            own is not getattr(type(self), "generated_forward", own)
            or ("forward" in self.__dict__ and not hasattr(self.__dict__["forward"], "takes_beliefs"))
        )
        if "beliefs" in kwargs and replaced:
            del kwargs["beliefs"]
            return Returned(base.__call__(self, *args, **kwargs), None)
        if "beliefs" in kwargs:
            if module_hooks._global_forward_hooks:
                _wrap_forward_hooks(module_hooks._global_forward_hooks, module_hooks._global_forward_hooks_with_kwargs)
            if module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks:
                _wrap_backward_hooks(module_hooks._global_backward_hooks)
                _wrap_backward_hooks(module_hooks._global_backward_pre_hooks)
            return base.__call__(self, *args, **kwargs)
        if MARK in self.__dict__ and SEEN not in self.__dict__[MARK] and not torch.compiler.is_compiling():
            self.__dict__[MARK][SEEN] = tree_map_only(Tensor, lambda value: value.detach().to("meta"), (args, kwargs))
        flow = running.flow
        if flow is None and (base is not nn.Module or NORMALIZER in self.__dict__) and _is_called_by_itself(self, args):
            warnings.warn(
                "a part of a converted model is called without beliefs, by code that convert has not seen: its first "
                "normalizers only measure. Let the model's forward call it, in a checkpoint too; or put the parts "
                "together first and convert the whole",
                stacklevel=2,
            )
        if flow is None or replaced or not flow.is_here():
            if MARK in self.__dict__ and _may_drop_beliefs(self):
                return _call_without_unused_beliefs(self, base.__call__, args, kwargs)
            return base.__call__(self, *args, **kwargs)
        return flow.through(functools.partial(base.__call__, self), args, kwargs)

    def register_forward_hook(self: nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
        hook = hook if _is_of_torch(hook) else PlainHook(hook, options.get("with_kwargs", False))
        return base.register_forward_hook(self, hook, **options)

    def register_forward_pre_hook(self: nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
        if not _is_of_torch(hook):
            hook, options = PlainPreHook(hook, options.get("with_kwargs", False)), {**options, "with_kwargs": True}
        return base.register_forward_pre_hook(self, hook, **options)

    def register_full_backward_hook(self: nn.Module, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return base.register_full_backward_hook(self, PlainBackwardHook(hook), prepend)

    def register_full_backward_pre_hook(self: nn.Module, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return base.register_full_backward_pre_hook(self, PlainBackwardHook(hook), prepend)

    own = (
        *(__call__, register_forward_hook, register_forward_pre_hook),
        *(register_full_backward_hook, register_full_backward_pre_hook),
    )
    return {
        "takes_beliefs": True,
        "__prepare_scriptable__": refuse_script,
        **{method.__name__: method for method in own},
    }


def refuse_script(layer: nn.Module) -> Any:
    """Raise ValueError: torch.jit.script calls this to ask what to compile in a layer's place."""
    raise ValueError(
        f"torch.jit.script cannot compile {type(layer).__name__}: script kalmannorm.fold(model), or trace the model in "
        "evaluation by torch.jit.trace"
    )


def _refuse_qconfig(layer: nn.Module, qconfig: object) -> None:
    """Raise ValueError if torch's quantization sets a normalizer's qconfig: it would then replace layers by class, and
    does not know this one."""
    if qconfig is not None:
        raise ValueError(
            f"torch's quantization has no {type(layer).__name__}: quantize kalmannorm.fold(model); or, to train, "
            "prepare the original model and convert that"
        )


refusing_qconfig = property(fset=_refuse_qconfig)  # quantize_dynamic, which replaces linear layers alone, sets None


class TakesBeliefs(nn.Module):
    """Base of the normalizers that take beliefs."""

    takes_beliefs: bool
    qconfig = refusing_qconfig


def or_leaf(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a layer's __call__ so that torch.fx records it as a leaf, like those of torch's own layers."""

    @functools.wraps(call)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], fx.Proxy):
            return record_layer(self, args, kwargs)
        return call(self, *args, **kwargs)

    return __call__


for _name, _method in methods(nn.Module).items():
    setattr(TakesBeliefs, _name, or_leaf(_method) if _name == "__call__" else _method)


def _wrap_forward_hooks(hooks: dict[int, Callable[..., Any]], with_kwargs: Container[int]) -> None:
    for key, hook in hooks.items():
        if not isinstance(hook, PlainHook) and not _is_of_torch(hook):
            hooks[key] = PlainHook(hook, key in with_kwargs)


def _wrap_backward_hooks(hooks: dict[int, Callable[..., Any]]) -> None:
    hooks.update(
        {key: hook if isinstance(hook, PlainBackwardHook) else PlainBackwardHook(hook) for key, hook in hooks.items()}
    )


def wrap_hooks(module: nn.Module) -> None:
    """Wrap the hooks that were registered before the module took beliefs."""
    _wrap_forward_hooks(module._forward_hooks, module._forward_hooks_with_kwargs)
    for key, hook in module._forward_pre_hooks.items():
        if not isinstance(hook, PlainPreHook) and not _is_of_torch(hook):
            module._forward_pre_hooks[key] = PlainPreHook(hook, key in module._forward_pre_hooks_with_kwargs)
            module._forward_pre_hooks_with_kwargs[key] = True
    if module._is_full_backward_hook:
        _wrap_backward_hooks(module._backward_hooks)
        _wrap_backward_hooks(module._backward_pre_hooks)


def unwrap_hooks(module: nn.Module) -> None:
    """Put back a module's hooks as they were registered."""
    for key, hook in module._forward_hooks.items():
        module._forward_hooks[key] = hook.hook if isinstance(hook, PlainHook) else hook
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, PlainPreHook):
            module._forward_pre_hooks[key] = hook.hook
            if not hook.with_kwargs:
                del module._forward_pre_hooks_with_kwargs[key]
    for hooks in (module._backward_hooks, module._backward_pre_hooks):
        hooks.update({key: hook.hook for key, hook in hooks.items() if isinstance(hook, PlainBackwardHook)})


def _is_of_torch(hook: Any) -> bool:
    """Say whether a hook is torch's own, and stays unwrapped.

    FSDP's hooks must see beliefs; those that compute weights (torch.nn.utils) ignore what is passed. Tensor
    parallelism's (torch.distributed.tensor) replace arguments and results, as a user's do.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    where = getattr(hook, "__module__", None) or type(hook).__module__
    of_hook = [module for module in (where, type(hook).__module__) if not module.startswith("torch.distributed.tensor")]
    return any(module.startswith(("torch.distributed.", "torch.nn.")) for module in of_hook)


def rounds(hook: Any) -> bool:
    """Say whether a hook is a quantization observer, which returns the module's result, at most rounded."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.ao.")


def version(value: object) -> int:
    """Return how often a tensor was changed in place; 0 for other values, and where torch does not count."""
    counted = isinstance(value, Tensor) and not torch.compiler.is_compiling() and not value.is_inference()
    return value._version if counted else 0  # type: ignore[attr-defined]


class PlainHook:
    """A user's forward hook, wrapped: it sees the module's ordinary result, without beliefs, and may replace it."""

    def __init__(self, hook: Callable[..., Any], with_kwargs: bool) -> None:
        self.hook, self.with_kwargs = hook, with_kwargs

    def __call__(self, module: nn.Module, args: Args, *rest: Any) -> Any:
        *kwargs, out = rest
        if self.with_kwargs:
            kwargs = [{key: value for key, value in kwargs[0].items() if key != "beliefs"}]
        if not isinstance(out, Estimated | Returned):
            return self.hook(module, args, *kwargs, out)
        before = version(out.y)
        new = self.hook(module, args, *kwargs, out.y)
        if new is None:
            return None if version(out.y) == before else Returned(out.y, None)
        return Returned(new, out[1] if rounds(self.hook) else None)


class PlainBackwardHook:
    """A user's backward hook or backward pre-hook, wrapped: it sees the gradients of the module's ordinary result.

    It does not see those of the beliefs beside it, which torch leaves out (None).
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *grads: Any) -> Any:
        *of_inputs, of_outputs = grads
        has_beside = hasattr(module, "takes_beliefs") and all(grad is None for grad in of_outputs[1:])
        beside = of_outputs[1:] if has_beside else ()
        new = self.hook(module, *of_inputs, of_outputs[: len(of_outputs) - len(beside)])
        return new if new is None or of_inputs else (*new, *beside)


class PlainPreHook:
    """A user's forward pre-hook, wrapped: it sees the arguments without beliefs. Those that it replaces have none."""

    def __init__(self, hook: Callable[..., Any], with_kwargs: bool) -> None:
        self.hook, self.with_kwargs = hook, with_kwargs

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        beliefs = kwargs.get("beliefs")
        given = {key: value for key, value in kwargs.items() if key != "beliefs"}
        new = self.hook(module, args, given) if self.with_kwargs else self.hook(module, args)
        if new is None:
            return None
        if self.with_kwargs:
            new_args, new_kwargs = new
        else:
            new_args, new_kwargs = new if isinstance(new, tuple) else (new,), given
        if "beliefs" not in kwargs:
            return new_args, new_kwargs
        both = enumerate(zip(args, new_args, strict=False))
        kept = tuple(pick(beliefs, i, "") if old is one else None for i, (old, one) in both)
        return new_args, {**new_kwargs, "beliefs": (kept, {})}
