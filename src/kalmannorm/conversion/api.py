"""`convert` replaces a model's normalizers and hands beliefs from one to the next; `fold` goes back to plain BatchNorm.

A converted model keeps its modules under their names; each becomes an instance of a generated subclass of its own class
(classes.py). A container's forward is traced and rewritten to compute beliefs beside its operations (trace.py,
write.py, forwards.py); one that cannot be traced runs unchanged, with beliefs followed by tensor (flow.py).
"""

import functools
import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_map_only

from kalmannorm.conversion import classes, forwards
from kalmannorm.conversion.batch_norms import trace_layers
from kalmannorm.conversion.flow import stand_ins
from kalmannorm.conversion.generate import beneath_parametrization, generate, generate_layers, is_container
from kalmannorm.conversion.layers import (
    add_biases,
    build_normalizer,
    copied,
    delete,
    is_frozen,
    keep_more,
    plain_batch_norm,
    replace,
    share_noise,
    thaw_frozen,
)
from kalmannorm.conversion.mapping import Mapped, assign, choices
from kalmannorm.conversion.report import observe
from kalmannorm.norm import Estimator, GroupedStatistics, Whitening, contract, normalize_weights
from kalmannorm.norm.belief import Belief
from kalmannorm.norm.moments import Transition
from kalmannorm.norm.options import refuse_kind
from kalmannorm.norm.sampling import Noise
from kalmannorm.norm.whitened import fold_weights
from kalmannorm.presets import KALMAN, NEED_BIAS, PRESETS, preset_options

INPUT_BELIEF = ("input_belief_mean", "input_belief_var")  # names of a converted model's buffers
INPUT_COUNT = "input_belief_batches"  # with input_belief="data": the buffer that counts the batches seen so far
_MARK = contract.MARK


def convert(
    model: nn.Module,
    norm: str | Mapped,
    *,
    stat_batch: int | None = None,
    preset: str | None = None,
    predictor: str | None = None,
    input_belief: tuple[Tensor, Tensor] | str | None = None,
    returns_belief: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a copy of `model` with its BatchNorm layers replaced by `norm`, beliefs handed from each to the next.

    Args:
        model: a network with BatchNorm layers, or one that was converted before.
        norm: a name of NORMS for all layers; or a mapping {pattern of layer names: name, or (name, options)}
            (mapping.assign), in which `*` stands for all remaining layers.
        stat_batch: number of images that share statistics; None: the whole batch.
        preset: variant of Kalman Normalization (presets.py): `paper` (the default), `eq7`, `released`, `talk`, `v1`, or
            our `robust`.
        predictor: `closed` or `sampling`; None: the preset's.
        input_belief: (mean [C], var [C]) of the model's input, so that the first normalizer has a prior too (paper
            3.3). "argument": the model follows another one and is called as model(x, belief of x). "data": mean and
            variance are estimated from the inputs seen in training and kept in buffers, as moving averages are.
        returns_belief: the model precedes another one and returns (y, belief of y); None in place of a missing belief.
        options: the normalizer's own options, which override the preset's. For Kalman normalizers also `relu` (whether
            ReLUs change beliefs) and `transition`: the convolution's `weight`, or a `learned` matrix
            (moments.Transition). For convert itself: `leaves`, classes of modules that are called but not traced into
            (a belief ends there); `thaw`, whether FrozenBatchNorm2d layers are replaced too, by normalizers that
            train. Otherwise they stay constants, which beliefs pass through.

    The copy keeps the model's class, methods and hooks; its parts can be called, replaced and removed. State-dict keys,
    eps, momentum, affine parameters and moving statistics of the original are kept where the new normalizer has them.
    `wn` and `none` have none of these: every convolution gets a bias instead (with `wn` also weight normalization, see
    norm.initialize_weight_norm). A forward that torch.fx cannot trace runs unchanged and uncompiled, with beliefs
    followed by tensor. `belief_report` says which normalizers have no prior, and why.
    Raises ValueError: an unknown norm, preset or option; a preset, predictor or input_belief for a normalizer that has
    no belief; a model without BatchNorm, or with compiled, distributed or uninitialized lazy parts.
    """
    relu, learned = True, False
    leaves, thaw = _classes(options.pop("leaves", ())), options.pop("thaw", False)
    for name, switch in (("thaw", thaw), ("returns_belief", returns_belief), ("relu", options.get("relu", True))):
        refuse_kind("convert", name, bool, switch)
    kinds = choices(norm, options)
    if not any(kind in KALMAN for kind, _ in kinds.values()):
        for name, given in (("preset", preset), ("predictor", predictor), ("input_belief", input_belief)):
            if given is not None:
                raise ValueError(f"{name} is an option of {' and '.join(KALMAN)}: normalizer {norm!r} has no belief")
    for pattern, (kind, own) in kinds.items():
        if kind in KALMAN:
            preset = preset or "paper"
            own = preset_options(preset, kind, stat_batch, own)
            predictor = predictor or PRESETS[preset]["predictor"]
            relu, learned = own.pop("relu", True), _is_learned(own.pop("transition", "weight"), predictor)
            of_preset = own.pop("input_belief", None)  # never given twice: it is an argument of this function
            input_belief = of_preset if input_belief is None else input_belief
            kinds[pattern] = kind, own
    _refuse_no_module(model)
    _refuse_parts(model)
    source = _folded(model) if _MARK in model.__dict__ else copied(model)
    if thaw:
        thaw_frozen(source)
    layers = _batch_norms(source)
    if not layers and any(contract.NORMALIZER in module.__dict__ for module in source.modules()):
        source = _folded(source)  # a new model that was assembled from parts of a converted one
        layers = _batch_norms(source)
    _check(source, layers, leaves)
    traces, left = trace_layers(layers)
    layers = {name: layer for name, layer in layers.items() if name not in left}
    if not layers:
        raise ValueError(next(iter(left.values())))
    for why in left.values():
        warnings.warn(f"{why}: it is left as it is", stacklevel=2)
    chosen = assign(kinds, layers)
    built: dict[_BatchNorm, nn.Module] = {}  # by layer: one that has several names is built once
    for name, layer in layers.items():
        if layer not in built:
            kind, own = chosen[name]
            built[layer] = build_normalizer(kind, name, layer, stat_batch, own)
            built[layer].__dict__[contract.NORMALIZER] = True
            keep_more(layer, built[layer], name)
        source = built[layer] if name == "" else replace(source, name, built[layer])
    _refuse_unlike_rows(built.values())
    if norm in NEED_BIAS:
        add_biases(source)
    if norm == "wn":
        normalize_weights(source)
    share_noise(built.values())
    known, numbers = _keep_input_belief(source, input_belief)
    mark = ("closed" if predictor == "closed" else "sampled") if relu else "ignored"
    for new in built.values():
        if isinstance(new, Estimator):
            new.on_relu = mark
    as_they_are: dict[str, str] = {}
    generate_layers(traces, built)
    if any(isinstance(m, Estimator) for m in source.modules()):
        predictors = "noise" if predictor == "sampling" else "transition" if learned else ""
        as_they_are = generate(source, leaves, predictors, known)
        if known or returns_belief:
            classes.become(source, *forwards.root_code(type(source), known, mark, returns_belief))
    else:
        for module in list(source.modules()):
            if not is_container(module, leaves):
                continue
            if any(name in ("type", "class_of") for _, name, _ in stand_ins(type(module))):
                classes.become(module, forwards.ASKING)
            elif any(child in built.values() for child in module.children()):
                classes.become(module, forwards.REFUSING)
        if returns_belief:
            classes.become(source, forwards.WITHOUT_BELIEF)
    source.__dict__[_MARK] = {
        **{"as_they_are": as_they_are, "left": left, "names": tuple(layers)},
        **{contract.RETURNS: returns_belief, contract.GIVEN: numbers},
    }
    return source


def _batch_norms(source: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in source.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and not type(module).__module__.startswith("kalmannorm.norm")
    }


def _classes(leaves: Any) -> tuple[type[nn.Module], ...]:
    found = (leaves,) if isinstance(leaves, type) else tuple(leaves)
    for one in found:
        if not isinstance(one, type):
            raise ValueError(f"leaves must be classes of modules, not {one!r}")
    return found


def _refuse_no_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"a model must be a torch.nn.Module, not {model if isinstance(model, type) else type(model)}")


def _refuse_parts(model: nn.Module) -> None:
    """Raise ValueError for a compiled or distributed part, since a copy would use the original's code or gradients, and
    for a lazy one that has no shape yet."""
    for path, part in model.named_modules():
        kind = f"{path} ({type(part).__name__})" if path else type(part).__name__
        for name, wrapped in (("_orig_mod", "_orig_mod" in part._modules), ("module", "reducer" in vars(part))):
            if wrapped:
                raise ValueError(f"{kind} is wrapped: convert its .{name} before it is wrapped")
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(f"{kind} has no shape yet: call the model once before convert")


def _check(source: nn.Module, layers: dict[str, _BatchNorm], leaves: tuple[type[nn.Module], ...]) -> None:
    """Raise ValueError for a model without BatchNorm layers, and for a leaf that holds one."""
    kind = type(source).__name__
    if not layers:
        frozen = sum(is_frozen(module) for module in source.modules())
        advice = f"; its {frozen} FrozenBatchNorm2d layers are constants: thaw=True converts them" if frozen else ""
        raise ValueError(f"{kind} has no BatchNorm layer to convert{advice}")
    for path, module in source.named_modules():
        held = [name for name in layers if name.startswith(f"{path}.")] if isinstance(module, leaves) else []
        if held:
            raise ValueError(f"{path} ({type(module).__name__}) cannot be a leaf: it holds the normalizer {held[0]}")


def _refuse_unlike_rows(layers: Iterable[nn.Module]) -> None:
    """Raise ValueError if bkn and gkn are mixed and hand on posteriors: neither can use the other's beliefs."""
    estimators = [layer for layer in layers if isinstance(layer, Estimator)]
    of_groups = [isinstance(layer, GroupedStatistics) for layer in estimators]
    if any(of_groups) and not all(of_groups) and any(layer.belief == "posterior" for layer in estimators):
        raise ValueError(
            "bkn and gkn in one mapping: the one hands on beliefs of groups of images, the other of images. Take one "
            "of them, or belief='output' for both"
        )


def _is_learned(transition: str, predictor: str) -> bool:
    if predictor not in ("closed", "sampling"):
        raise ValueError(f"predictor must be 'closed' or 'sampling', not {predictor!r}")
    if transition not in ("weight", "learned"):
        raise ValueError(f"transition must be 'weight' or 'learned', not {transition!r}")
    if transition == "learned" and predictor == "sampling":
        raise ValueError("predictor='sampling' convolves with the layer's weight: take transition='weight' with it")
    return transition == "learned"


def _keep_input_belief(
    source: nn.Module, input_belief: tuple[Tensor, Tensor] | str | None
) -> tuple[str | None, dict[str, Any]]:
    """Register buffers for the belief of the model's input. Return root_code's `input_belief`, and the given numbers,
    which no state dict holds. ValueError: a belief of another form."""
    if input_belief in (None, "argument"):
        return input_belief, {}
    # In float32, as statistics are, or in the model's type where that is wider.
    like = next((p for p in source.parameters() if p.is_floating_point()), torch.zeros(()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    if input_belief == "data":
        first = next((m for m in source.modules() if isinstance(m, _ConvNd | nn.Linear)), None)
        channels = first.in_channels if isinstance(first, _ConvNd) else first.in_features if first is not None else 3
        for name, start in zip(INPUT_BELIEF, (0.0, 1.0), strict=True):
            source.register_buffer(name, torch.full((1, channels), start, dtype=dtype, device=like.device))
        source.register_buffer(INPUT_COUNT, torch.zeros((), dtype=dtype, device=like.device))
        return "data", {}
    if isinstance(input_belief, str):
        raise ValueError(f"input_belief must be (mean [C], var [C]), 'argument' or 'data', not {input_belief!r}")
    if any(isinstance(value, Tensor) and value.is_meta for value in input_belief):
        raise ValueError("input_belief: tensors on the device meta, which have no values: pass lists of numbers")
    numbers = [torch.as_tensor(value, dtype=dtype, device="cpu").flatten().tolist() for value in input_belief]
    values = [torch.as_tensor(value, dtype=dtype, device=like.device).view(1, -1) for value in numbers]
    if len(values) != 2 or values[0].shape != values[1].shape:
        shapes = [tuple(value.shape[1:]) for value in values]
        raise ValueError(f"input_belief must be (mean [C], var [C]), not of shapes {shapes}")
    for name, value in zip(INPUT_BELIEF, values, strict=True):
        source.register_buffer(name, value, persistent=False)
    return "buffers", dict(zip(INPUT_BELIEF, numbers, strict=True))


# --- back, and what happened -----------------------------------------------------------------------------------------


def is_converted(model: nn.Module) -> bool:
    """Say whether `model` itself came from `convert`; the parts of a converted model did not."""
    return _MARK in model.__dict__


def _conversion(model: nn.Module, otherwise: str) -> dict[str, Any]:
    """Return what `convert` noted on the model. ValueError, with the advice `otherwise`: it is not a converted one."""
    _refuse_no_module(model)
    if not is_converted(model):
        for name in ("_orig_mod", "module"):  # of torch.compile; of AveragedModel and DistributedDataParallel
            if isinstance(inner := getattr(model, name, None), nn.Module) and is_converted(inner):
                raise ValueError(f"{type(model).__name__} holds a converted model: pass its .{name}")
        raise ValueError(f"{type(model).__name__} is not a converted model: {otherwise}")
    return model.__dict__[_MARK]


def untraced(model: nn.Module) -> dict[str, str]:
    """Return the names of a converted model's parts whose forwards could not be traced, each with the reason.

    They run as they are, uncompiled, with beliefs followed by tensor. ValueError: not a converted model.
    """
    return dict(_conversion(model, "call kalmannorm.convert first")["as_they_are"])


def belief_report(model: nn.Module, *example: Any, **named: Any) -> dict[str, str | None]:
    """Say for each normalizer, in network order, whether a prior reaches it (None), or which operation lost the belief.

    Then follow the layers that were left as they are or replaced since the conversion. A copy of the model is run in
    training mode on `example` and `named`, the model's arguments; without them on random numbers of the shapes that the
    model was first called with. ValueError: not a converted model; no example and no call yet.
    """
    known = _conversion(model, "call kalmannorm.convert first")
    if not any(isinstance(module, Estimator) for module in model.modules()):
        return _replaced(model, known["names"])
    if not (example or named):
        if contract.SEEN not in known:
            raise ValueError("a model that was not called yet: pass what it is called with, belief_report(model, x)")
        example, named = tree_map_only(
            (Tensor, Belief),
            functools.partial(_random_like, model),
            known[contract.SEEN],
            lambda v: isinstance(v, Belief),
        )
    return observe(model, example, named) | known["left"] | _replaced(model, known["names"])


def _replaced(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """Return the normalizers that were replaced after the conversion, with a line that says by what: some code freezes
    and thaws BatchNorm by putting in other layers."""
    parts = dict(model.named_modules(remove_duplicate=False))
    found = {name: parts[name] for name in names if name in parts}
    return {
        name: f"no normalizer of convert's: a {type(part).__name__} was put in its place"
        for name, part in found.items()
        if not any(contract.NORMALIZER in module.__dict__ for module in part.modules())
    }


def _random_like(model: nn.Module, value: Any) -> Any:
    """Return random numbers in the value's shape, with the number of images rounded up to whole groups; zeros for an
    integer tensor, ones for a belief."""
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    if isinstance(value, Belief):  # its single row applies to all groups
        return Belief(*(torch.ones(1, of.shape[1], device=device) for of in value))
    group = math.lcm(*(getattr(module, "stat_batch", None) or 1 for module in model.modules()))
    images, *rest = value.shape if value.dim() else (1,)
    shape = (-(-images // group) * group, *rest) if value.dim() else ()
    return (torch.randn if value.is_floating_point() else torch.zeros)(shape, dtype=value.dtype, device=device)


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of the original model with plain BatchNorm layers that hold the moving statistics.

    For inference and export to ONNX: the copy needs no kalmannorm, and has the original's state-dict keys and the
    converted model's outputs in eval mode with moving statistics. ValueError: not a converted model; a normalizer
    without moving statistics.
    """
    _conversion(model, "there is nothing to fold")
    return _folded(model)


def _folded(model: nn.Module) -> nn.Module:
    """Do what `fold` does, also for a module that only contains converted parts."""
    plain = copied(model)
    for module in plain.modules():
        beneath_parametrization(module, classes.restore)
        if module.__dict__.pop(_MARK, None) is None:
            continue
        for name in INPUT_BELIEF:
            if name in module._non_persistent_buffers_set or INPUT_COUNT in module._buffers:
                delattr(module, name)
        module._buffers.pop(INPUT_COUNT, None)
    folded: dict[nn.Module, nn.Module] = {}
    for name, layer in list(plain.named_modules(remove_duplicate=False)):
        if contract.NORMALIZER not in layer.__dict__:  # not one that convert put in, or replaced since
            continue
        if not getattr(layer, "folds", False) or (
            layer.running_mean is None and isinstance(layer, Estimator | Whitening)
        ):
            raise ValueError(
                f"{name} ({type(layer).__name__}) has no moving statistics to fold into a BatchNorm, or not those alone"
            )
        if layer not in folded:
            folded[layer] = plain_batch_norm(layer)
        plain = folded[layer] if name == "" else replace(plain, name, folded[layer])
    for name, module in list(plain.named_modules()):
        if isinstance(module, Noise | Transition):
            delete(plain, name)
        module.__dict__.pop("predictor", None)
    fold_weights(plain)
    return plain
