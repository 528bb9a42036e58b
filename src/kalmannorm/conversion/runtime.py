"""The functions that generated forwards call: to run modules with beliefs of their arguments, and to apply rules."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_flatten, tree_unflatten

from kalmannorm.conversion import retrace
from kalmannorm.conversion.names import CHECKPOINT, class_of
from kalmannorm.conversion.operations import BY_NAME, FUNCTIONS, MODULES, MODULES_BY_NAME, class_of_rule, rule_of_class
from kalmannorm.conversion.pixelwise import convolution, linear, of_map, transposed_convolution
from kalmannorm.conversion.rules import Found, Known, Operation, Rule
from kalmannorm.conversion.trace import IN_SEGMENTS
from kalmannorm.norm import contract, moments
from kalmannorm.norm.belief import Args, Belief, Carried, Kwargs
from kalmannorm.norm.checkpoints import preserved
from kalmannorm.norm.contract import proxy_among
from kalmannorm.norm.sampling import sampled_conv

# Set while a report is made: observer(operation, the module or name that ran, its belief or why there is none).
observer: Callable[[Operation, object, Found], None] | None = None
follow: Any = None  # flow.follow: flow.py, which imports this module, sets it


def key_of(target: object) -> str:
    """Return the name by which generated code refers to a function, or to a method given by its name."""
    if isinstance(target, str):
        return f".{target}"
    return f"{getattr(target, '__module__', None) or 'torch'}.{getattr(target, '__name__', target)}"


def key_of_class(cls: type[nn.Module]) -> str:
    """Return the name by which the torch.fx graph of a converted model refers to the rule of a module class."""
    return f"class {class_of_rule(cls).__name__}"


_RULES: dict[str, Rule] = {key_of(target): rule for target, rule in FUNCTIONS.items()}
_RULES |= {key_of_class(cls): rule for cls, (rule, _) in MODULES.items()}
_RULES |= {f"class {name}": rule for name, rule in MODULES_BY_NAME.items()}


def call(module: Any, args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs) -> Any:
    """Call any module and return (y, belief of y, ...): pass it the beliefs if it takes them, else apply its class's
    rule. ValueError: torch's SyncBatchNorm in a converted model."""
    traced = bool(args) and isinstance(args[0], fx.Proxy)
    if type(module).__name__ == "CheckpointWrapper" and getattr(module.checkpoint_fn, "func", None) is CHECKPOINT:
        options = module.checkpoint_fn.keywords
        if options.get("use_reentrant"):  # a reentrant checkpoint would not find the tensors inside of beliefs
            wrapped = module._checkpoint_wrapped_module
            return checkpointed(wrapped, args, {**kwargs, **options}, beliefs, keyword_beliefs)
    if getattr(module, "takes_beliefs", False):
        given = beliefs, keyword_beliefs
        if traced:
            return retrace.call(module, args, kwargs, given)
        out = module(*args, **kwargs, beliefs=given)
        if observer is not None and out[1] is None and _is_changed(module):
            observer(Operation(out[0], args, kwargs, beliefs, keyword_beliefs), module, _HOOKED)
        return out
    if type(module) is nn.SyncBatchNorm:
        raise ValueError(_TORCH_SYNC.format("a layer"))
    if module._modules and not traced and any(hasattr(part, "takes_beliefs") for part in module.modules()):
        return follow(type(module).__call__, module, args, kwargs, (beliefs, keyword_beliefs))
    y, as_it_is = _called(module, args, kwargs)
    rule, attributes = rule_of_class(type(module)) if as_it_is else (_replaced, ())
    operation = Operation(y, args, kwargs, beliefs, keyword_beliefs)
    if attributes:
        operation = operation._replace(args=(operation.x, *(getattr(module, name) for name in attributes)), kwargs={})
    if traced:
        return y, belief_of(key_of_class(type(module)), *operation[:5])
    return y, apply(rule, operation, module)


_HOOKED = "a hook or a forward of its own, or a __call__, changes what it does"


def _is_changed(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or contract.has_call_of_its_own(class_of(module))


def _replaced(operation: Operation) -> str:
    return _HOOKED


def _called(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Any, bool]:
    """Call a module. Return the result, and whether the module's class computed it from these very arguments: neither
    a forward set on the instance nor a hook interfered."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if all(map(contract.rounds, hooks)):
        return module(*args, **kwargs), "forward" not in vars(module)
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_watched, recursive=False)(module, args, kwargs)  # type: ignore[no-any-return]
    return _watched(module, args, kwargs)


def _watched(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Any, bool]:
    """Call a module that has hooks. Return as `_called` does, by comparing what the forward and the caller see."""
    seen: list[Any] = []

    def see(_: nn.Module, args: Args, kwargs: Kwargs, y: Any) -> None:
        seen[:] = [*args, *kwargs.values(), y], contract.version(y)

    watch = module.register_forward_hook(see, prepend=True, with_kwargs=True)
    try:
        y = module(*args, **kwargs)
    finally:
        watch.remove()
    same = list(map(id, seen[0])) == list(map(id, [*args, *kwargs.values(), y]))
    return y, same and contract.version(y) == seen[1] and "forward" not in vars(module)


def parts_of(module: nn.Module) -> tuple[str, ...]:
    """Return what a container's traced forward takes for granted of each part: the name, the class of an activation,
    and whether the part changes its input in place."""
    return tuple(_look(name, part) for name, part in module._modules.items() if part is not None)


def _look(name: str, part: nn.Module) -> str:
    kind = type(part).__name__ if type(part).__module__ == nn.ReLU.__module__ else ""
    return f"{name} {kind}{' in place' if part.__dict__.get('inplace') else ''}".rstrip()


def has_parts(module: nn.Module, parts: tuple[str, ...]) -> bool:
    """Say whether the module still has the parts that `parts_of` listed: none was added, removed, set to None, replaced
    by another activation, or switched to or from in-place."""
    return parts_of(module) == parts


def refuse_torch_sync(container: nn.Module) -> None:
    """Raise ValueError for torch's SyncBatchNorm in place of one of our normalizers: it knows no statistics groups."""
    for name, child in container._modules.items():
        if type(child) is nn.SyncBatchNorm:
            raise ValueError(_TORCH_SYNC.format(name))


_TORCH_SYNC = (
    "{} is a torch.nn.SyncBatchNorm in a converted model, whose statistics would be of the whole batch: convert with "
    "kalmannorm.convert(model, 'syncbn', stat_batch=...) in place of convert_sync_batchnorm"
)


def belief_of(
    key: str, y: Any, args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs, kind: str = ""
) -> "Known | fx.Proxy":
    """Return the belief of a function's or method's result y, by the rule of the name `key` (key_of)."""
    if isinstance(y, fx.Proxy):
        known = proxy_among((beliefs, keyword_beliefs)) is not None
        return retrace.record(belief_of, key, y, args, kwargs, beliefs, keyword_beliefs, kind) if known else None
    rule = _RULES.get(key) or BY_NAME.get(key.rpartition(".")[2])
    return apply(rule, Operation(y, args, kwargs, beliefs, keyword_beliefs, kind), key)


def apply(rule: Rule | None, operation: Operation, what: object) -> Known:
    """Apply a rule to an operation of `what` (a module, or a name) and tell the observer. Return the belief or None."""
    found = "" if rule is None or not (operation.beliefs or operation.keyword_beliefs) else rule(operation)
    if observer is not None:
        observer(operation, what, found)
    return None if isinstance(found, str) else found


def lost(value: object, why: str) -> None:
    """Return None for the belief of a value that was changed in place under another name, and tell the observer why."""
    if observer is not None:
        observer(Operation(value, (), {}, (), {}), why, "in place")


def changed(pair: tuple[Any, ...], position: int) -> Known:
    """Return the belief of an argument that a module changed in place, from the triple that the module returned."""
    changes = pair[2] if len(pair) > 2 else None
    return None if changes is None else changes.get(position)


def normalized(base: Any, layer: nn.Module, args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs) -> Any:
    """Return (y, belief) of `base`, the normalizer that a layer with more code of its own is derived from."""
    if getattr(base, "takes_beliefs", False):
        return base.forward(layer, *args, **kwargs, beliefs=(beliefs, keyword_beliefs))
    return base.forward(layer, *args, **kwargs), None


def checkpointed(
    module: Any, args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs, called: Callable[..., Any] = call
) -> Any:
    """Call checkpoint(module, *args, **kwargs) with beliefs passed through as plain tensors: reentrant checkpoints do
    not find tensors inside of other objects. `called` is what calls the module with beliefs."""
    names = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
    own = {key: value for key, value in kwargs.items() if key in names}
    rest = {key: value for key, value in kwargs.items() if key not in names}
    tensors, spec = tree_flatten((args, rest, beliefs, {k: v for k, v in keyword_beliefs.items() if k not in names}))
    form: list[Any] = []

    def run(*tensors: Any) -> Any:
        out, *form[:] = tree_flatten(called(module, *tree_unflatten(tensors, spec))[:2])
        return tuple(out)

    return tree_unflatten(list(CHECKPOINT(run, *tensors, **own)), form[0])


def in_segments(module: Any, args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs) -> Any:
    """Call checkpoint_sequential(module, segments, input, ...) with beliefs: all segments but the last are
    checkpoints."""
    given = inspect.signature(IN_SEGMENTS).bind(module, *args, **kwargs)
    segments, x = given.arguments["segments"], given.arguments["input"]
    belief = beliefs[1] if len(beliefs) > 1 else keyword_beliefs.get("input")
    options = {"use_reentrant": given.arguments.get("use_reentrant", True), **given.arguments.get("kwargs", {})}
    children = [child for child in module.children() if not isinstance(child, moments.Predictor)]
    size = len(children) // segments
    for start in range(0, size * (segments - 1), size):
        x, belief = checkpointed(children[start : start + size], (x,), options, (belief,), {}, _in_turn)
    return _in_turn(children[size * (segments - 1) :], (x,), {}, (belief,), {})


def _in_turn(children: list[nn.Module], args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs) -> Any:
    """Call modules one after the other. Return (y, belief of y)."""
    for child in children:
        y, belief, *_ = call(child, args, kwargs, beliefs, keyword_beliefs)
        args, beliefs = (y,), (belief,)
    return args[0], beliefs[0]


def children_of(module: Any) -> Iterator[Callable[..., Any]]:
    """Yield a Sequential's children; to torch's checkpoint_sequential, one stand-in for each segment.

    checkpoint_sequential would call the children in turn without beliefs. All of its segments but the last get an
    identity; the last gets a function that runs the whole Sequential in segments, with beliefs.
    """
    frame = None if torch.compiler.is_compiling() or contract.running.flow is not None else sys._getframe(1)
    if frame is None or frame.f_code is not IN_SEGMENTS.__code__:
        yield from type(module).converted.original.children(module)
        return
    options = {"use_reentrant": frame.f_locals["use_reentrant"], "preserve_rng_state": frame.f_locals["preserve"]}
    segments = frame.f_locals["segments"]
    for _ in range(segments - 1):
        yield nn.Identity()
    yield lambda x: in_segments(module, (segments, x), options, (None, known_input(module, x)), {})[0]


def known_input(model: nn.Module, x: Any) -> Belief | None:
    """Return the belief of a model's input from the model's buffers; None if there are none, or x is no batch with as
    many channels."""
    mean, var = (model._buffers.get(f"input_belief_{name}") for name in ("mean", "var"))
    if mean is None or var is None:
        return None
    is_batch = isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == mean.shape[1]
    if not (is_batch or isinstance(x, fx.Proxy)):
        return None
    return seen_input(model, x) if "input_belief_batches" in model._buffers else Belief(mean, var)


def seen_input(model: Any, x: Any) -> Belief:
    """Return mean and variance of the inputs that the model saw in training, as the belief of its input. In training x
    is counted first. ValueError: torch.fx traces a model in training."""
    if model.training:
        retrace.refuse(model, (x,))
    return preserved(model, functools.partial(_see_input, model, x))


@torch.no_grad()
def _see_input(model: Any, x: Tensor) -> Belief:
    """Update the buffers in training: a mean over the first ten batches, then a moving average with rate 0.1."""
    mean, var = model.input_belief_mean, model.input_belief_var
    if model.training and x.numel():
        model.input_belief_batches += 1
        rate = (1 / model.input_belief_batches).clamp_min(0.1)
        of_batch = torch.var_mean(x.to(mean.dtype), [i for i in range(x.dim()) if i != 1], correction=0)
        var.lerp_(of_batch[0][None], rate)
        mean.lerp_(of_batch[1][None], rate)
    return Belief(mean.clone(), var.clone())


# --- convolutions and linear layers: they compute their belief in their own forward, where FSDP has gathered the weight


def of_convolution(layer: _ConvNd, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, belief: Known) -> Known:
    """Predict the belief of a convolution's output in closed form."""
    given = x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
    return apply(convolution, Operation(y, given, {}, (belief,), {}), layer)


_TRANSPOSED: Any = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d


def transposed(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None) -> Tensor:
    """Compute a transposed convolution as its class does, but with a weight that was read once."""
    pixels = len(layer.kernel_size)
    padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, pixels, layer.dilation
    )
    how = layer.stride, layer.padding, padding, layer.groups, layer.dilation
    return _TRANSPOSED[pixels - 1](x, weight, bias, *how)  # type: ignore[no-any-return]


def of_transposed(
    layer: _ConvTransposeNd, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, belief: Known
) -> Known:
    """Predict the belief of a transposed convolution's output in closed form."""
    given = x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    return apply(transposed_convolution, Operation(y, given, {}, (belief,), {}), layer)


def of_linear(layer: nn.Linear, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, belief: Known) -> Known:
    """Predict the belief of a linear layer's output."""
    return apply(linear, Operation(y, (x, weight, bias), {}, (belief,), {}), layer)


def _predictor(layer: nn.Module) -> Any:
    """Return the predictor that a layer has of its own. RuntimeError: a DataParallel replica in training, whose
    predictor would be the original model's, on the first device."""
    if layer.__dict__.get("_is_replica") and layer.training:
        raise RuntimeError(
            "DataParallel's replicas share draws and learned transitions, which are of the first device: train with "
            "DistributedDataParallel, or convert with predictor='closed' and transition='weight'"
        )
    return layer.__dict__["predictor"][0]


def of_transition(layer: _ConvNd, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, belief: Known) -> Known:
    """Predict the belief of a convolution's output by the layer's learned transition matrix."""
    transition = _predictor(layer)
    operation = Operation(y, (x,), {}, (belief,), {})
    return apply(lambda o: of_map(lambda b, _: transition(b, bias), o.belief, y, weight), operation, layer)


def of_sample(layer: _ConvNd, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, belief: Known) -> Known:
    """Predict the belief of a convolution's output from a drawn sample of its input, rectified if a ReLU is pending."""
    found: Found = ""
    if layer.padding_mode != "zeros":
        found = f"padding_mode={layer.padding_mode!r}, which the sampling predictor does not draw"
    elif isinstance(belief, Carried) and belief.axes:
        found = "of something that is not a map"
    elif isinstance(belief, Belief | Carried):
        carried = belief if isinstance(belief, Carried) else Carried(belief, "", "sampled")
        noise = _predictor(layer)
        how = (layer.stride, layer.padding, layer.dilation, layer.groups, carried.relu == "pending")
        drawn = sampled_conv(carried.belief, noise(carried.belief, x), weight, bias, *how)
        found = Carried(drawn, "", "ignored" if carried.relu == "ignored" else "sampled")
    return apply(lambda _: found, Operation(y, (x,), {}, (belief,), {}), layer)
