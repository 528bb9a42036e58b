"""Give a model's modules their generated forwards: parents are traced before their parts and written after them."""

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from kalmannorm.conversion import classes, forwards
from kalmannorm.conversion.attach import Search
from kalmannorm.conversion.layers import copied, replace
from kalmannorm.conversion.operations import MODULES_BY_NAME
from kalmannorm.conversion.proxies import Untraceable
from kalmannorm.conversion.trace import APPENDS, Passed, Trace, trace
from kalmannorm.conversion.write import Summary
from kalmannorm.norm import Estimator
from kalmannorm.norm.moments import Transition
from kalmannorm.norm.sampling import Noise

# Layers that compute their beliefs in their own forward.
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward


def is_container(module: nn.Module, leaves: tuple[type[nn.Module], ...]) -> bool:
    """Say whether a module has a forward to write beliefs into: not torch's own modules, nor any with a rule."""
    if isinstance(module, (Estimator, torch.jit.ScriptModule, *leaves)) or type(module).__name__ in MODULES_BY_NAME:
        return False
    if classes.generated(type(module)) is not None or _is_layer(type(module)):
        return False
    if "forward" in module.__dict__:  # set on the instance
        return any(isinstance(part, Estimator) for part in module.modules())
    if type(module).forward in forwards.NO_FORWARD:
        return False
    own = ("torch.nn.", "kalmannorm.norm.")
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith(own)


def _is_convolution(kind: Any) -> bool:
    """Say whether a class computes its convolution as torch's does."""
    return any(kind.forward is of.forward and kind._conv_forward is of._conv_forward for of in _CONVOLUTIONS)


def _is_layer(kind: Any) -> bool:
    return kind.forward is nn.Linear.forward or kind.forward in _TRANSPOSED or _is_convolution(kind)


def generate_layers(traces: dict[_BatchNorm, dict[str, Trace]], built: dict[_BatchNorm, nn.Module]) -> None:
    """Give each normalizer in place of a BatchNorm subclass that class's own code, around the new normalization."""
    for layer, new in built.items():
        names, summary = dict[str, Any](), Summary()
        if traces.get(layer):
            code, names, summary = forwards.container_code(new, traces[layer], {})
        elif layer in traces:
            code = forwards.AS_ITS_ORIGINAL
        elif classes.methods_of(type(layer), type(new)):
            code = forwards.AS_ITS_BASE
        else:
            continue
        classes.become(new, code, names | {classes.ORIGINAL: type(layer)}, summary)


def generate(source: nn.Module, leaves: tuple[type[nn.Module], ...], own: str, known: str | None) -> dict[str, str]:
    """Give the modules of a model with Kalman normalizers forwards that compute beliefs.

    Args:
        source: the model, with its new normalizers.
        leaves: classes of modules that are called but not traced into.
        own: the kind of predictor for each convolution whose belief reaches a normalizer: `noise`, `transition`, or ""
            for none of its own.
        known: where the belief of the model's input is known from (forwards.root_code).

    Return the names of the containers that run as they are, each with the reason. ValueError: a forward has an argument
    called beliefs.
    """
    containers = [
        (name, module)
        for name, module in source.named_modules()
        if is_container(module, leaves) and "parametrizations" not in name.split(".")  # those compute weights
    ]
    for name, module in containers:
        if "beliefs" in inspect.signature(type(module).forward).parameters:
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}): its forward has an argument called beliefs, by "
                "which converted modules pass theirs on: rename it"
            )
    traces, as_they_are = _trace(containers)
    predictors = _attach(source, traces, own, known) if own else {}
    summaries: dict[nn.Module, Summary] = {}
    for module in source.modules():
        made = classes.generated(type(module))
        if made is not None:
            summaries[module] = made.summary
        elif isinstance(module, _ConvNd | nn.Linear):
            _generate_layer(module, predictors, own)
    for _, module in reversed(containers):
        names: dict[str, Any] = {}
        summary = Summary()
        if "forward" in module.__dict__:
            code = forwards.AS_IT_IS
            module.__dict__["forward"] = classes.Followed(module.__dict__["forward"])
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            code, summary = forwards.SEQUENTIAL, forwards.sequential_summary(module, summaries)
        elif module in traces:
            code, names, summary = forwards.container_code(module, traces[module], summaries)
        elif any(isinstance(part, Estimator) for part in module.modules()):
            code = forwards.AS_IT_IS
        else:
            continue
        summaries[module] = summary
        classes.become(module, code, names, summary)
    return as_they_are


def _trace(containers: list[tuple[str, nn.Module]]) -> tuple[dict[nn.Module, dict[str, Trace]], dict[str, str]]:
    """Trace the containers, parents first: what they pass to their parts decides how these are traced.

    Return the traces, and for those that cannot be traced the reason by name.
    """
    traces: dict[nn.Module, dict[str, Trace]] = {}
    as_they_are: dict[str, str] = {}
    passed: dict[nn.Module, Passed] = defaultdict(Passed.nothing)
    appending: set[nn.Module] = set()
    for name, module in containers:
        if "forward" in module.__dict__:
            as_they_are[name] = f"{type(module).__name__}: its forward was set on the instance"
            continue
        if type(module).forward is nn.Sequential.forward:
            continue
        if isinstance(module, fx.GraphModule) and type(module).__mro__[1] is not fx.GraphModule:
            as_they_are[name] = f"{type(module).__mro__[1].__name__}: its graph may change"
            continue
        try:
            both = trace(module, passed[module])
        except Untraceable as error:
            as_they_are[name] = f"{type(module).__name__}: {error}"
            if str(error) == APPENDS:
                appending.add(module)
            continue
        traces[module] = both
        _note_passed(module, both["train"], passed)
    # A part that appends to a list changes what the parent sees in it, and the parent was traced without the change.
    for name, module in reversed(containers):
        called = [n for n in traces[module]["train"].graph.nodes if n.op == "call_module"] if module in traces else []
        parts = [module.get_submodule(str(node.target)) for node in called]
        if any(part in appending for part in parts):
            as_they_are[name] = f"{type(module).__name__}: a part {APPENDS}"
            del traces[module]
            if passed[module].lists:
                appending.add(module)
    return traces, as_they_are


def _note_passed(module: nn.Module, traced: Trace, passed: dict[nn.Module, Passed]) -> None:
    """Note what a forward's calls show of the arguments of the modules that it calls."""
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        child = module.get_submodule(str(node.target))
        if isinstance(child, torch.jit.ScriptModule):  # has no signature to match arguments with
            continue
        parameters = list(inspect.signature(type(child).forward).parameters)[1:]
        known = passed[child]
        for name, value in (dict(zip(parameters, node.args, strict=False)) | node.kwargs).items():
            if isinstance(value, list | tuple) or _is_sum_of_lists(value):
                known.lists.add(name)
            plain = isinstance(value, bool | int | float | str | None)
            if plain and name not in known.given and known.fixed.setdefault(name, value) == value:  # type: ignore[arg-type]
                continue
            known.fixed.pop(name, None)
            known.given.add(name)


def _is_sum_of_lists(value: object) -> bool:
    if not isinstance(value, fx.Node) or value.target is not operator.add:
        return False
    return any(isinstance(one, list | tuple) for one in value.args)


def _generate_layer(layer: Any, predictors: dict[nn.Module, nn.Module], own: str) -> None:
    """Give a convolution or a linear layer a forward that predicts the belief of its output."""
    kind: Any = type(layer)
    base = kind.__bases__[0] if parametrize.is_parametrized(layer) else kind
    if "forward" in layer.__dict__:
        return
    if base.forward is nn.Linear.forward:
        code = forwards.LINEAR
    elif base.__name__ == "Conv2dSame":
        code = forwards.OTHER_CONVOLUTION
    elif base.forward in _TRANSPOSED:
        code = forwards.TRANSPOSED
    elif not _is_convolution(base):
        return
    elif not own:
        code = forwards.CONVOLUTION
    elif layer in predictors:
        code = forwards.SAMPLED if own == "noise" else forwards.LEARNED
        layer.__dict__["predictor"] = (predictors[layer],)  # in a tuple, since a module would be registered as a part
    else:
        return
    beneath_parametrization(layer, lambda layer: classes.become(layer, code))


def beneath_parametrization(layer: nn.Module, change: Callable[[nn.Module], None]) -> None:
    """Change a layer's class by `change`; that of a parametrization stays on top of it, where torch expects it when it
    removes the parametrization."""
    kind: Any = type(layer)
    if not parametrize.is_parametrized(layer):
        return change(layer)
    layer.__class__ = kind.__bases__[0]
    change(layer)
    body = {key: value for key, value in kind.__dict__.items() if key not in ("__dict__", "__weakref__")}
    layer.__class__ = type(kind.__name__, (type(layer),), body)
    return None


def _attach(
    source: nn.Module, traces: dict[nn.Module, dict[str, Trace]], own: str, known: str | None
) -> dict[nn.Module, nn.Module]:
    """Put predictors beside the convolutions that need one of their own. Return them by convolution."""
    predictors: dict[nn.Module, nn.Module] = {}

    def found(name: str, layer: _ConvNd, single: bool) -> None:
        if layer in predictors or not _is_convolution(type(layer)):
            return
        number = sum(isinstance(module, Noise) for module in source.modules())
        # A copy in evaluation mode, since reading the weight of a spectral norm in training advances its iteration.
        predictors[layer] = (
            Noise(number, shared=single) if own == "noise" else Transition(cast(_ConvNd, copied(layer).eval()))
        )
        replace(source, f"{name}_{own}", predictors[layer])

    for mode in ("eval", "train"):
        search = Search(traces, mode, found)
        search.run(source, "", {}, search.given(known))
    return predictors
