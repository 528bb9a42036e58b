"""One line for any CNN: `convert` swaps the normalizers and threads the Kalman belief between them; `fold` goes back.

The converted model is explicit code, `print(model.code)`: every belief stands there as a variable.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.graphs import compile_code, source_code
from kalmannorm.layers import (
    add_biases,
    build_normalizer,
    delete,
    is_frozen,
    keep_more,
    plain_batch_norm,
    replace,
    share_noise,
    thaw_frozen,
)
from kalmannorm.mapping import Mapped, assign
from kalmannorm.norm import NORMS, Estimator, normalize_weights
from kalmannorm.norm.moments import Transition
from kalmannorm.norm.sampling import Noise
from kalmannorm.norm.whitened import fold_weights
from kalmannorm.presets import KALMAN, NEED_BIAS, PRESETS, SYNONYMS, preset_options
from kalmannorm.thread import Threader
from kalmannorm.tracing import has_forward_of_its_own, trace

INPUT_BELIEF = ("input_belief_mean", "input_belief_var")  # buffers of a converted model


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
) -> "Converted":
    """A copy of `model` with every BatchNorm layer replaced by normalizer `norm`, beliefs threaded between them.

    Args:
        model: a network with BatchNorm2d layers (BatchNorm1d where inputs are [N, C]) that torch.fx can trace; or one
            that was converted before.
        norm: a name of NORMS; or a normalizer for each layer, {pattern of layer names: name, or (name, options)}
            (mapping.assign), `*` for what is left.
        stat_batch: images that share statistics; None is the whole batch.
        preset: variant of Kalman Normalization (presets.py): `paper`, which None stands for, `eq7`, `released`, `talk`,
            `v1`, and `robust`, ours.
        predictor: `closed` or `sampling`; None is the preset's.
        input_belief: (mean [C], var [C]) of the model's input, a prior for the first normalizer too (paper 3.3). Or
            "argument": the model is a part behind another one, and is called as model(x, belief of x).
        returns_belief: the model is a part ahead of another one: it returns (y, belief of y, None if there is none).
        options: the normalizer's own, over the preset's. For Kalman normalizers also `relu` (whether ReLUs change
            beliefs) and `transition`: the convolution's `weight`, or a `learned` matrix (belief.Transition).
            Of convert itself: `leaves`, classes of modules that are called as they are, not traced into (they lose the
            belief); `thaw`, whether FrozenBatchNorm2d layers are replaced too, by normalizers that train. Else they
            stay constants, which a belief passes.

    State-dict keys, eps, momentum, affine parameters and moving statistics of the original are kept, where the new
    normalizer has them; `wn` and `none` have none, and give every Conv2d a bias in their place (`wn` also weight
    normalization: see norm.initialize_weight_norm). Train and eval modes behave as the original's, whichever mode it
    is in now.
    Raises ValueError: an unknown norm, preset or option; a preset, predictor or input_belief for a normalizer that has
    no belief; a model without BatchNorm; one that cannot be traced.
    """
    relu, learned = True, False
    norm = _plainly_named(norm)
    leaves, thaw = tuple(options.pop("leaves", ())), options.pop("thaw", False)
    if not isinstance(norm, str):
        if options:
            raise ValueError(f"{next(iter(options))}: options of normalizers stand in the mapping, (name, options)")
        for entry in norm.values():
            if (name := entry if isinstance(entry, str) else entry[0]) in NEED_BIAS:
                raise ValueError(f"{name} is for all layers of a network: give it alone, not in a mapping")
    elif norm not in NORMS:
        raise ValueError(f"unknown normalizer {norm!r}; valid: {', '.join(NORMS)}")
    elif norm in KALMAN:
        preset = preset or "paper"
        options = preset_options(preset, norm, stat_batch, options)
        predictor = predictor or PRESETS[preset]["predictor"]
        relu, learned = options.pop("relu", True), _is_learned(options.pop("transition", "weight"), predictor)
        of_preset = options.pop("input_belief", None)  # never given twice: it is an argument of this function
        input_belief = of_preset if input_belief is None else input_belief
    else:
        for name, given in (("preset", preset), ("predictor", predictor), ("input_belief", input_belief)):
            if given is not None:
                raise ValueError(f"{name} is an option of {' and '.join(KALMAN)}: normalizer {norm!r} has no belief")
    source = fold(model) if isinstance(model, Converted) else copy.deepcopy(model)
    if thaw:
        thaw_frozen(source)
    layers = {name: m for name, m in source.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}
    _check(source, layers, leaves)
    chosen = assign({"*": (norm, options)} if isinstance(norm, str) else norm, layers)
    built: dict[nn.Module, nn.Module] = {}  # a layer can have several names
    for name, layer in layers.items():
        if layer not in built:
            kind, own = chosen[name]
            if kind not in NORMS:
                raise ValueError(f"{name}: unknown normalizer {kind!r}; valid: {', '.join(NORMS)}")
            if kind in KALMAN and not isinstance(norm, str):
                own = preset_options(preset or "paper", kind, stat_batch, own)
            built[layer] = build_normalizer(kind, name, layer, stat_batch, own)
            keep_more(layer, built[layer], name)
        replace(source, name, built[layer])
    if norm in NEED_BIAS:
        add_biases(source)
    if norm == "wn":
        normalize_weights(source)
    if options.get("noise") == "shared":
        share_noise(list(built.values()))

    buffers = None
    if isinstance(input_belief, str):
        if input_belief != "argument":
            raise ValueError(f"input_belief must be (mean [C], var [C]) or 'argument', not {input_belief!r}")
    elif input_belief is not None:
        buffers = INPUT_BELIEF
        values = [torch.as_tensor(value, dtype=torch.float32).view(1, -1) for value in input_belief]
        if len(values) != 2 or values[0].shape != values[1].shape:
            raise ValueError(
                f"input_belief must be (mean [C], var [C]), not of shapes {[tuple(v.shape[1:]) for v in values]}"
            )
        for name, value in zip(buffers, values, strict=True):
            source.register_buffer(name, value, persistent=False)
    graphs = {}
    report: dict[str, str | None] = {}
    for mode, graph in _trace(source, layers, leaves).items():
        graphs[mode] = graph
        known = input_belief if isinstance(input_belief, str) else buffers
        report = _thread(graph, source, layers, predictor or "closed", relu, learned, known, returns_belief)
    return Converted(source, graphs, report, type(model).__name__, list(layers))


def _plainly_named(norm: str | Mapped) -> str | Mapped:
    """The same without synonyms: KN is BKN."""
    if isinstance(norm, str):
        return SYNONYMS.get(norm, norm)
    return {
        pattern: SYNONYMS.get(entry, entry) if isinstance(entry, str) else (SYNONYMS.get(entry[0], entry[0]), entry[1])
        for pattern, entry in norm.items()
    }


def _check(source: nn.Module, layers: dict[str, _BatchNorm], leaves: tuple[type[nn.Module], ...]) -> None:
    kind = type(source).__name__
    if not layers:
        frozen = sum(is_frozen(module) for module in source.modules())
        advice = f"; its {frozen} FrozenBatchNorm2d layers are constants: thaw=True converts them" if frozen else ""
        raise ValueError(f"{kind} has no BatchNorm layer to convert{advice}")
    for path, module in source.named_modules():
        held = [name for name in layers if name.startswith(f"{path}.")] if isinstance(module, leaves) else []
        if held:
            raise ValueError(f"{path} ({type(module).__name__}) cannot be a leaf: it holds the normalizer {held[0]}")


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
    layers = {name: plain.get_submodule(name) for name in model.normalizers}
    folded: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if not getattr(layer, "folds", False):
            raise ValueError(
                f"{name} ({type(layer).__name__}) has no moving statistics to fold into a BatchNorm, or not those alone"
            )
        if layer not in folded:
            folded[layer] = plain_batch_norm(layer)
        replace(plain, name, folded[layer])
    for name, module in list(plain.named_modules()):
        if isinstance(module, Noise | Transition):
            delete(plain, name)
    fold_weights(plain)
    for name in INPUT_BELIEF:
        plain._buffers.pop(name, None)
        plain._non_persistent_buffers_set.discard(name)
    plain.training = model.training  # submodules keep their own mode
    return plain


class Converted(nn.Module):
    """A converted network: the original's parameters and submodules, run by generated code.

    `code` is that code; `report` what belief_report returns. Training and evaluation have code of their own where the
    original's differ (dropout's functional form, auxiliary heads).
    """

    def __init__(
        self,
        source: nn.Module,
        graphs: dict[str, fx.Graph],
        report: dict[str, str | None],
        name: str,
        normalizers: list[str],
    ) -> None:
        super().__init__()
        self.report, self.name, self.normalizers = report, name, normalizers
        self._sources = {mode: source_code(graph) for mode, graph in graphs.items()}
        self.training = source.training  # not train(): submodules keep their own mode
        self._adopt(source)

    def _adopt(self, source: nn.Module) -> None:
        # The very same dictionaries: whatever happens to the parameters happens to the original's hierarchy too, from
        # which fold takes the module back. A tuple, since a module in an attribute would be registered.
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[held] = source.__dict__[held]
        self.__dict__["_original"] = (source,)
        self._run = {mode: compile_code(*parts) for mode, parts in self._sources.items()}

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
        # On the original's hierarchy, which has its plain attributes and constants too.
        return self._run[self._mode](self.source, *args, **kwargs)

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


# --- tracing ----------------------------------------------------------------------------------------------------------


def _trace(
    source: nn.Module, layers: dict[str, _BatchNorm], leaves: tuple[type[nn.Module], ...]
) -> dict[str, fx.Graph]:
    """With the originals of the layers that do more than normalize in their places: it is their code that is read."""
    inner = {name: layer for name, layer in layers.items() if has_forward_of_its_own(layer)}
    built = {name: source.get_submodule(name) for name in inner}
    try:
        for name, layer in inner.items():
            replace(source, name, layer)
        return trace(source, set(layers), set(inner), leaves)
    finally:
        for name, new in built.items():
            replace(source, name, new)


def _is_learned(transition: str, predictor: str) -> bool:
    if predictor not in ("closed", "sampling"):
        raise ValueError(f"predictor must be 'closed' or 'sampling', not {predictor!r}")
    if transition not in ("weight", "learned"):
        raise ValueError(f"transition must be 'weight' or 'learned', not {transition!r}")
    if transition == "learned" and predictor == "sampling":
        raise ValueError("predictor='sampling' convolves with the layer's weight: take transition='weight' with it")
    return transition == "learned"


# --- beliefs ---------------------------------------------------------------------------------------------------------


def _thread(
    graph: fx.Graph,
    source: nn.Module,
    layers: dict[str, _BatchNorm],
    predictor: str,
    relu: bool,
    learned: bool,
    input_belief: tuple[str, str] | str | None,
    returns_belief: bool,
) -> dict[str, str | None]:
    """Calls the normalizers by their contract and gives each the belief that reaches it. Returns the belief report."""

    def add_noise(convolution: str, shared: bool) -> str:
        name = f"{convolution}_noise"
        parent, _, leaf = name.rpartition(".")
        if not hasattr(source.get_submodule(parent), leaf):
            layer = sum(isinstance(m, Noise) for m in source.modules())
            replace(source, name, Noise(layer, shared=shared))
        return name

    def add_transition(convolution: str) -> str:
        name, layer = f"{convolution}_transition", source.get_submodule(convolution)
        parent, _, leaf = name.rpartition(".")
        if not hasattr(source.get_submodule(parent), leaf):
            assert isinstance(layer, nn.Conv2d)
            replace(source, name, Transition(layer))
        return name

    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in layers]
    for call in calls:
        with graph.inserting_after(call):
            value = graph.create_node("call_function", operator.getitem, (call, 0), name=f"{call.name}_y")
        call.replace_all_uses_with(value, delete_user_cb=lambda user, value=value: user is not value)
    modules = dict(source.named_modules())
    given: tuple[str, str] | fx.Node | None = None
    if isinstance(input_belief, str):  # an argument
        x = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(x):
            given = graph.placeholder(f"{x.name}_belief")
    else:
        given = input_belief
    kinds: dict[str, type[nn.Module]] = {name: type(layer) for name, layer in layers.items()}
    transition = add_transition if learned else None
    threader = Threader(graph, modules, predictor, relu, given, add_noise, transition, kinds)
    report: dict[str, str | None] = {}
    for call in calls:
        if not isinstance(modules[str(call.target)], Estimator):
            continue
        feature = threader.inputs[call][0]
        why_not = threader.why_not(feature)
        # A normalizer that is called several times has a prior if every call has one.
        report[str(call.target)] = report.get(str(call.target)) or why_not
        if why_not is None:
            call.args = (call.args[0], threader.write(feature))
    if returns_belief:
        output = next(node for node in graph.nodes if node.op == "output")
        (feature,) = threader.inputs[output]
        output.args = ((output.args[0], None if threader.why_not(feature) else threader.write(feature)),)
    graph.lint()
    return report
