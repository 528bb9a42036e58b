"""One line for any CNN: `convert` swaps the normalizers and threads the Kalman belief between them; `fold` goes back.

The converted model is explicit code, `print(model.code)`: every belief stands there as a variable.
"""

import copy
import itertools
import linecache
import operator
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.belief import Noise
from kalmannorm.norm import NORMS, Estimator, GroupedStatistics
from kalmannorm.presets import KALMAN, PRESETS, preset_options
from kalmannorm.thread import Threader

_serial = itertools.count()


def convert(
    model: nn.Module,
    norm: str,
    *,
    stat_batch: int | None = None,
    preset: str = "paper",
    predictor: str | None = None,
    input_belief: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> "Converted":
    """A copy of `model` with every BatchNorm layer replaced by normalizer `norm`, beliefs threaded between them.

    Args:
        model: a network with BatchNorm2d layers (BatchNorm1d where inputs are [N, C]) that torch.fx can trace; or one
            that was converted before.
        norm: a name of NORMS.
        stat_batch: images that share statistics; None is the whole batch.
        preset: variant of Kalman Normalization, `paper` or `released` (presets.py).
        predictor: `closed` or `sampling`; None is the preset's.
        input_belief: (mean [C], var [C]) of the model's input, a prior for the first normalizer too (paper 3.3).
        options: the normalizer's own, and `relu` (whether ReLUs change beliefs), over the preset's.

    State-dict keys, eps, momentum, affine parameters and moving statistics of the original are kept, where the new
    normalizer has them. Train and eval modes behave as the original's, whichever mode it is in now.
    Raises ValueError: an unknown norm, preset or option; a model without BatchNorm; one that cannot be traced.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown normalizer {norm!r}; valid: {', '.join(NORMS)}")
    relu = options.pop("relu", True)
    if norm in KALMAN:
        options = preset_options(preset, norm, stat_batch, options)
        predictor = predictor or PRESETS[preset]["predictor"]
        if predictor not in ("closed", "sampling"):
            raise ValueError(f"predictor must be 'closed' or 'sampling', not {predictor!r}")
    source = fold(model) if isinstance(model, Converted) else copy.deepcopy(model)
    layers = {name: m for name, m in source.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BatchNorm layer to convert")
    for name, layer in layers.items():
        _replace(source, name, _build(norm, name, layer, stat_batch, options))

    buffers = None
    if input_belief is not None:
        buffers = ("input_mean", "input_var")
        for name, value in zip(buffers, input_belief, strict=True):
            source.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).view(1, -1), persistent=False)
    graphs = {}
    report: dict[str, str | None] = {}
    for mode, graph in _trace(source, set(layers)).items():
        graphs[mode] = graph
        report = _thread(graph, source, list(layers), predictor or "closed", relu, buffers)
    return Converted(source, graphs, report, type(model).__name__)


def belief_report(model: nn.Module) -> dict[str, str | None]:
    """Per normalizer, in network order: None if a prior reaches it, else what lost it."""
    if not isinstance(model, Converted):
        raise ValueError(f"{type(model).__name__} is not a converted model: call kalmannorm.convert first")
    return dict(model.report)


def fold(model: nn.Module) -> nn.Module:
    """The original module back, with plain BatchNorm layers that hold the moving statistics: for inference and ONNX.

    Same keys, same outputs in eval mode with moving statistics; needs no kalmannorm. A copy. ValueError: a normalizer
    without moving statistics.
    """
    if not isinstance(model, Converted):
        raise ValueError(f"{type(model).__name__} is not a converted model: there is nothing to fold")
    plain = copy.deepcopy(model.source)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Noise):
            _delete(plain, name)
        elif isinstance(layer, GroupedStatistics):
            _replace(plain, name, _plain_batch_norm(layer))
        elif isinstance(layer, Estimator) or (name in model.report):
            raise ValueError(f"{name} ({type(layer).__name__}) has no moving statistics to fold into a BatchNorm")
    for name in ("input_mean", "input_var"):
        plain._buffers.pop(name, None)
    return plain.train(model.training)


class Converted(nn.Module):
    """A converted network: the original's parameters and submodules, run by generated code.

    `code` is that code; `report` what belief_report returns. Training and evaluation have code of their own where the
    original's differ (dropout's functional form, auxiliary heads).
    """

    def __init__(
        self, source: nn.Module, graphs: dict[str, fx.Graph], report: dict[str, str | None], name: str
    ) -> None:
        super().__init__()
        self.report, self.name = report, name
        self._sources = {mode: _source(graph) for mode, graph in graphs.items()}
        self.training = source.training  # not train(): submodules keep their own mode
        self._adopt(source)

    def _adopt(self, source: nn.Module) -> None:
        # The very same dictionaries: whatever happens to the parameters happens to the original's hierarchy too, from
        # which fold takes the module back. A tuple, since a module in an attribute would be registered.
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[held] = source.__dict__[held]
        self.__dict__["_original"] = (source,)
        self._run = {mode: _compile(*parts) for mode, parts in self._sources.items()}

    @property
    def source(self) -> nn.Module:
        """The original's hierarchy with the new normalizers in it. Its own forward does not run any more."""
        return self.__dict__["_original"][0]

    @property
    def code(self) -> str:
        """The code that runs in the present mode."""
        return self._sources[self._mode][0]

    @property
    def _mode(self) -> str:
        return "train" if self.training else "eval"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run[self._mode](self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt(self.source)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Converted":
        twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        memo[id(self)] = twin
        return twin

    def extra_repr(self) -> str:
        return f"converted from {self.name}"


# --- normalizers ------------------------------------------------------------------------------------------------------


def _build(norm: str, name: str, old: _BatchNorm, stat_batch: int | None, options: dict[str, Any]) -> nn.Module:
    try:
        kept = {"eps": old.eps, "momentum": old.momentum}
        new = NORMS[norm](old.num_features, stat_batch=stat_batch, **{**kept, **options})
    except TypeError as error:
        raise ValueError(f"normalizer {norm!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return _carry_over(old, new, name)


def _carry_over(old: nn.Module, new: nn.Module, name: str = "") -> nn.Module:
    """Affine parameters and moving statistics, where both have them; device, type, mode and what is trained, too."""
    reference = next(itertools.chain(old.parameters(False), old.buffers(False)), None)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        value, target = getattr(old, key, None), getattr(new, key, None)
        if isinstance(target, Tensor):
            if value is None:
                target.requires_grad_(False)  # the original has no affine parameters: nothing to learn there
            else:
                with torch.no_grad():
                    target.copy_(value)
                target.requires_grad_(value.requires_grad)
    if isinstance(new, GroupedStatistics):
        new.layer_name = name
        if getattr(old, "running_mean", None) is None:
            new.statistics = "online"
    return new.train(old.training)


def _plain_batch_norm(layer: GroupedStatistics) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
    _carry_over(layer, plain)
    return plain


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def _delete(root: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    delattr(root.get_submodule(parent), leaf)


# --- graphs and code --------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Leaves are torch's own modules and the normalizers."""

    def __init__(self, normalizers: set[str]) -> None:
        super().__init__()
        self.normalizers = normalizers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.normalizers or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, normalizers: set[str]) -> dict[str, fx.Graph]:
    """One graph for training and one for evaluation: tracing freezes `self.training`. Modes are left as they were."""
    modes = {module: module.training for module in model.modules()}
    graphs = {}
    try:
        for mode in ("eval", "train"):
            model.train(mode == "train")
            graphs[mode] = _Tracer(normalizers).trace(model)
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}: {error} ({_user_line(error)}); convert a submodule that it "
            "can trace, or put that part into a function marked by torch.fx.wrap"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return graphs


def _user_line(error: Exception) -> str:
    """The last line of the traceback that is neither torch's nor ours."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "no line of the model's own"


def _thread(
    graph: fx.Graph,
    source: nn.Module,
    normalizers: list[str],
    predictor: str,
    relu: bool,
    input_belief: tuple[str, str] | None,
) -> dict[str, str | None]:
    """Calls the normalizers by their contract and gives each the belief that reaches it. Returns the belief report."""

    def add_noise(convolution: str) -> str:
        name = f"{convolution}_noise"
        parent, _, leaf = name.rpartition(".")
        if not hasattr(source.get_submodule(parent), leaf):
            _replace(source, name, Noise(sum(isinstance(m, Noise) for m in source.modules())))
        return name

    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in normalizers]
    for call in calls:
        with graph.inserting_after(call):
            value = graph.create_node("call_function", operator.getitem, (call, 0), name=f"{call.name}_y")
        call.replace_all_uses_with(value, delete_user_cb=lambda user, value=value: user is not value)
    modules = dict(source.named_modules())
    threader = Threader(graph, modules, predictor, relu, input_belief, add_noise)
    report: dict[str, str | None] = {}
    for call in calls:
        if not isinstance(modules[str(call.target)], Estimator):
            continue
        feature = threader.inputs[call][0]
        report[str(call.target)] = threader.lost[feature]
        if threader.lost[feature] is None:
            call.args = (call.args[0], threader.write(feature))
    graph.lint()
    return report


Source = tuple[str, dict[str, Any]]


def _source(graph: fx.Graph) -> Source:
    """The graph as code and the names it uses, both of which can be pickled (modules by name)."""
    code = graph.python_code("self")
    return code.src, {k: ("module", v.__name__) if isinstance(v, ModuleType) else v for k, v in code.globals.items()}


def _compile(code: str, names: dict[str, Any]) -> Callable[..., Any]:
    scope: dict[str, Any] = {k: sys.modules[v[1]] if isinstance(v, tuple) else v for k, v in names.items()}
    filename = f"<converted {next(_serial)}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(code, filename, "exec"), scope)
    return scope["forward"]
