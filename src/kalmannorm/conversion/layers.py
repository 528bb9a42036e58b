"""Replacing one layer by another: what a normalizer takes over from its BatchNorm layer, and gives back to it."""

import copy
import copyreg
import functools
import inspect
import itertools
from collections import deque
from collections.abc import Iterable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from kalmannorm.conversion.names import content
from kalmannorm.norm import NORMS, Estimator, Whitening, contract
from kalmannorm.norm.options import options_of

CONSTANT = ("frozen", "wn", "none")  # without parameters, or with constants only
OF_IMAGES = ("gn", "ln", "in", "gkn")  # never have moving statistics
HOOKS = [key for key in vars(nn.Module()) if key.startswith(("_forward_", "_backward_", "_is_full_backward_"))]
_ALL_HOOKS = [key for key in vars(nn.Module()) if key.endswith("hooks")]
# The number of axes that an input may have, by the method that checks it; a subclass may define its own check.
_DIMS: dict[object, tuple[int, ...]] = {
    **{nn.BatchNorm1d._check_input_dim: (2, 3), nn.BatchNorm2d._check_input_dim: (4,)},
    nn.BatchNorm3d._check_input_dim: (5,),
}
_OF_BATCH_NORM = {*vars(nn.BatchNorm2d(1))}
BATCH_NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def build_normalizer(
    norm: str, name: str, old: _BatchNorm, stat_batch: int | None, options: dict[str, Any]
) -> nn.Module:
    """Build the normalizer `norm` in place of the BatchNorm layer `old`, called `name`. ValueError: a wrong option."""
    _refuse_computed(old, name)
    known = options_of(NORMS[norm])
    try:
        kept: dict[str, Any] = {"eps": old.eps, "momentum": old.momentum}
        if norm not in CONSTANT:
            kept |= {key: False for key in _left_out(old, norm) if known is None or key in known}
        new = NORMS[norm](old.num_features, stat_batch=stat_batch, **{**kept, **options})
    except TypeError as error:
        raise ValueError(f"normalizer {norm!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if hasattr(new, "replaced"):
        new.replaced = (type(old), old.affine, old.track_running_stats)  # type: ignore[assignment]
    for kind in (nn.BatchNorm1d, nn.BatchNorm3d):
        if isinstance(old, kind) and isinstance(new, nn.BatchNorm2d):
            new.__class__ = _of_kind(type(new), kind)  # type: ignore[arg-type, assignment]
    if (check := type(old)._check_input_dim) in _DIMS:
        new.dims = _DIMS[check]  # type: ignore[assignment]
    carry_over(old, new, name)
    if "affine" not in options:  # where the original has no gamma or beta, the new layer does not learn one either
        for key, part in itertools.product(("weight", "bias"), [part for part, _ in _parts(new)]):
            if getattr(old, key, None) is None and isinstance(parameter := getattr(part, key, None), nn.Parameter):
                parameter.requires_grad_(False)
    return new


def _refuse_computed(old: _BatchNorm, name: str) -> None:
    """Raise ValueError if gamma or beta is computed: the normalizer would keep only its present value."""
    for key in ("weight", "bias"):
        if not (key in old._parameters or key in old._buffers) and isinstance(getattr(old, key, None), Tensor):
            raise ValueError(
                f"{name} ({type(old).__name__}): its {key} is computed, by a parametrization, pruning or code of its "
                "own, which no normalizer takes over: make it permanent before convert (remove_parametrizations, "
                "prune.remove), and parametrize or prune what was converted"
            )


class _OfKind(type):
    """Metaclass of normalizers' classes that also derive from the original's class, since other code looks for
    instances of that (to freeze BatchNorm1d layers)."""


@functools.cache
def _of_kind(normalizer: Any, kind: type) -> Any:
    names = ("__module__", "__qualname__", "__doc__")
    return _OfKind(normalizer.__name__, (normalizer, kind), {name: getattr(normalizer, name) for name in names})


def _reduced(cls: _OfKind) -> tuple[Any, ...]:
    return _of_kind, cls.__bases__


copyreg.pickle(_OfKind, _reduced)


def _parts(layer: nn.Module) -> list[tuple[nn.Module, slice]]:
    """Return the modules that hold the layer's channels, each with its slice: the layer itself, or its sublayers."""
    return getattr(layer, "parts", [(layer, slice(None))])


def _left_out(old: _BatchNorm, norm: str) -> list[str]:
    """Return the options to switch off, since the original lacks affine parameters, a bias or moving statistics."""
    without = {"affine": not old.affine, "bias": old.affine and old.bias is None}
    without["track_running_stats"] = old.running_mean is None and norm not in OF_IMAGES
    return [key for key, left_out in without.items() if left_out]


def carry_over(old: nn.Module, new: nn.Module, name: str = "") -> nn.Module:
    """Give `new` the affine parameters (the same objects, where shapes agree) and moving statistics that both layers
    have, and the device, dtype, mode, requires_grad and hooks of `old`. Return `new`."""
    reference = next(itertools.chain(old.parameters(False), old.buffers(False)), None)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    for key, (part, channels) in itertools.product(BATCH_NORM_STATE, _parts(new)):
        value: Any = getattr(old, key, None)
        target: Any = getattr(part, key, None)
        learned = isinstance(value, nn.Parameter) and isinstance(target, nn.Parameter)  # frozen BN has buffers
        if learned and value.shape == target.shape:  # the same object, since other layers or lists may share it
            setattr(part, key, value)
        elif isinstance(target, Tensor) and value is not None:
            with torch.no_grad():
                target.copy_(value[channels] if value.dim() else value)
            if learned:
                target.requires_grad_(value.requires_grad)
    if getattr(old, "running_mean", None) is not None and not getattr(old, "track_running_stats", True):
        for part, _ in _parts(new):  # the original's moving statistics are not updated
            part.track_running_stats = False  # type: ignore[assignment]
    if isinstance(gamma := getattr(old, "weight", None), nn.Parameter) and not gamma.requires_grad:
        for key, parameter in new.named_parameters(recurse=False):  # the new q and R are frozen where gamma is
            parameter.requires_grad_(parameter.requires_grad and key in BATCH_NORM_STATE)
    for part in new.modules():
        if hasattr(part, "layer_name"):
            part.layer_name = name  # type: ignore[assignment]
    if not hasattr(old, "activation_post_process"):  # a quantization observer: its hook uses that part of `old`
        contract.unwrap_hooks(old)
        new.__dict__.update({key: copy.copy(old.__dict__[key]) for key in HOOKS})
    if getattr(new, "takes_beliefs", False):
        contract.wrap_hooks(new)
    return new.train(old.training)


def keep_more(old: nn.Module, new: nn.Module, name: str) -> None:
    """Give `new` the parts and attributes that a BatchNorm subclass from elsewhere (timm's BatchNormAct2d) adds.

    ValueError: the normalizer has one of the same name.
    """
    if type(old).__module__.startswith("torch."):
        return
    for kind in ("_parameters", "_buffers", "_modules"):
        for key, value in getattr(old, kind).items():
            if key in BATCH_NORM_STATE:
                continue
            if hasattr(new, key):
                raise ValueError(f"{name} ({type(old).__name__}): {type(new).__name__} has a {key} of its own")
            getattr(new, kind)[key] = value
    for key, value in vars(old).items():
        if key not in _OF_BATCH_NORM and not hasattr(new, key):
            new.__dict__[key] = value
    new.__dict__["original"] = (old,)  # in a tuple, since a module would be registered as a part


def _original_of(layer: nn.Module) -> nn.Module:
    """Return a copy of the layer that `keep_more` kept as the original, with the present values and parts."""
    (old,) = copy.deepcopy(layer.__dict__["original"])
    carry_over(layer, old)
    for kind in ("_parameters", "_buffers", "_modules"):
        for key in getattr(old, kind).keys() - set(BATCH_NORM_STATE):
            getattr(old, kind)[key] = getattr(layer, kind)[key]
    return old


def is_frozen(module: nn.Module) -> bool:
    """Say whether this is a FrozenBatchNorm2d, by name and buffers: torchvision, detectron2 and DETR each have one."""
    buffers = ("weight", "bias", "running_mean", "running_var")
    return type(module).__name__.endswith("FrozenBatchNorm2d") and all(name in module._buffers for name in buffers)


def thaw_frozen(root: nn.Module) -> None:
    """Replace every FrozenBatchNorm2d by a BatchNorm2d with the same values."""
    for name, frozen in list(root.named_modules(remove_duplicate=False)):
        if is_frozen(frozen):  # DETR's has no attribute for its eps of 1e-5
            layer = nn.BatchNorm2d(len(frozen.weight), getattr(frozen, "eps", 1e-5))  # type: ignore[arg-type]
            replace(root, name, carry_over(frozen, layer))


def plain_batch_norm(layer: Any) -> nn.Module:
    """Return the BatchNorm layer that computes what a normalizer with `folds` does in evaluation."""
    if "original" in layer.__dict__:
        return _original_of(layer)
    kind, affine, _ = layer.replaced
    if isinstance(layer, Whitening):
        return layer.folded(kind)
    affine = affine or isinstance(layer.weight, nn.Parameter)  # the option affine=True, where the original had none
    plain = kind(layer.num_features, layer.eps, layer.momentum, affine, layer.running_mean is not None)
    if layer.bias is None:
        plain.register_parameter("bias", None)
    carry_over(layer, plain)
    return plain


def add_biases(root: nn.Module) -> None:
    """Give every convolution without a bias one of zeros."""
    for layer in root.modules():
        if isinstance(layer, _ConvNd) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))


def share_noise(layers: Iterable[nn.Module]) -> None:
    """Make all layers with noise="shared" hold the same parameter R, the first one's."""
    sharing = [layer for layer in layers if isinstance(layer, Estimator) and layer.noise == "shared"]
    for layer in sharing[1:]:
        layer.noise_raw = sharing[0].noise_raw


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of the model that can do more than copy.deepcopy.

    Computed tensors that modules keep (weights under pruning or torch.nn.utils.weight_norm, caches), which deepcopy
    refuses, are copied by value. A hook that closes over parts of the original is replaced by one over the copy's.
    ValueError: a forward that would go on calling the original.
    """
    _refuse_foreign_forwards(model)
    held: dict[int, Any] = {}
    for module in model.modules():
        _collect(vars(module), held)
    computed = [value for value in held.values() if isinstance(value, Tensor) and not value.is_leaf]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    made = copy.deepcopy(model, memo)
    for hooks in (hooks for module in made.modules() for key, hooks in vars(module).items() if key in _ALL_HOOKS):
        for key, hook in hooks.items():
            if inspect.isfunction(hook):
                hooks[key] = _of_copy(hook, memo)
            elif inspect.isfunction(inner := getattr(hook, "hook", None)):  # in a wrapper of ours or of torch's
                hook.hook = _of_copy(inner, memo)
    return made


def _collect(value: Any, held: dict[int, Any]) -> None:
    """Add a value and what containers hold in it to `held`, by id; a container may be inside of itself."""
    if id(value) not in held:
        held[id(value)] = value
        if isinstance(value, dict | list | tuple | deque):
            for one in value.values() if isinstance(value, dict) else value:
                _collect(one, held)


def _of_copy(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return the function; if it closes over objects of the original (the model, a list), one that has the copy's."""
    held = [content(cell) for cell in function.__closure__ or ()]
    if not any(id(one) in memo for cell in held for one in cell):
        return function
    cells = tuple(CellType(*(memo.get(id(one), one) for one in cell)) for cell in held)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    return made


def _refuse_foreign_forwards(model: nn.Module) -> None:
    """Raise ValueError if a forward that was set on an instance refers to the model by another name than self."""
    modules = set(model.modules())
    for name, module in model.named_modules():
        # A compiled module makes its forward anew.
        forward = None if "_orig_mod" in module._modules else module.__dict__.get("forward")
        if any(one in modules for one in _modules_of(getattr(forward, "__func__", forward))):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}): its forward is a function that calls the model by "
                "another name than self, and in a copy would still call the original: set such a forward after convert"
            )


def _modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a function refers to by closure or global, directly or by a bound method: its copies
    share them."""
    if not inspect.isfunction(function):
        return []
    named = inspect.getclosurevars(function)
    values = [getattr(value, "__self__", value) for value in (*named.nonlocals.values(), *named.globals.values())]
    return [value for value in values if isinstance(value, nn.Module)]


def replace(root: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the part `name` of `root`. Return `root`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
    return root


def delete(root: nn.Module, name: str) -> None:
    """Remove the part `name` of `root`."""
    parent, _, leaf = name.rpartition(".")
    delattr(root.get_submodule(parent), leaf)
