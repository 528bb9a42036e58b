"""Beliefs followed by tensor while a forward runs that torch.fx cannot trace, or that changed since it was traced.

Every function that the forward calls is intercepted and its rule applied, as in a generated forward; modules that take
beliefs are given those of their arguments.
"""

import copyreg
import functools
import operator
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kalmannorm.conversion import retrace, runtime
from kalmannorm.conversion.batch_norms import BATCH_NORM
from kalmannorm.conversion.names import CHECKPOINT, Loan, Surroundings, class_of, lending, lent_now
from kalmannorm.conversion.operations import WEIGHTED, formula_of, formula_with, rule_of, sign_of
from kalmannorm.conversion.pixelwise import PRODUCTS
from kalmannorm.conversion.rules import Operation, fields_of, has_belief
from kalmannorm.conversion.runtime import apply, call, checkpointed, normalized
from kalmannorm.norm import GroupedStatistics, contract
from kalmannorm.norm.belief import Args, Belief, Beliefs, Carried, Kwargs, Returned
from kalmannorm.norm.checkpoints import is_within
from kalmannorm.norm.contract import running
from kalmannorm.norm.moments import channel_belief
from kalmannorm.norm.whitened import Layer

# Names of operators' methods -> the function, or the method's name, under which FUNCTIONS has the rule.
_METHODS: dict[str, Any] = {"__getitem__": operator.getitem}
_METHODS |= {f"__{name}__": name for name in ("add", "sub", "mul", "neg")}
_METHODS |= {f"__i{name}__": f"{name}_" for name in ("add", "sub", "mul")}
_METHODS |= {"__radd__": "add", "__rmul__": "mul", "__truediv__": "div", "__itruediv__": "div_"}
# Methods by which 2 - x and 2 / x are x.__rsub__(2) and x.__rdiv__(2) -> the operators.
_REFLECTED = {"__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv}
_CONSTANT = object()  # marks, in place of a belief, a tensor that is computed from parameters alone


class Flow(TorchFunctionMode):
    """The beliefs of the tensors in one running forward, and the mode that intercepts its function calls."""

    def __init__(self, switches: bool = False, batch_norm: Callable[..., Any] | None = None) -> None:
        """Start without beliefs. `switches`: the forward itself switches gradients off or on. `batch_norm`: replaces
        F.batch_norm."""
        super().__init__()
        self._batch_norm = batch_norm
        self._known: dict[int, tuple[Tensor, int, Any]] = {}
        # A tensor that is a function of another, pixel by pixel: both, each with its version, and the formula.
        self._curve: dict[int, tuple[Tensor, int, Tensor, int, str]] = {}
        self._switches, self._place = switches, _place()

    def __enter__(self) -> "Flow":
        self._outer, running.flow = running.flow, self
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        running.flow = self._outer
        super().__exit__(*args)

    def is_here(self) -> bool:
        """Say whether this forward itself is running, and not a checkpoint inside of it: when that is recomputed, the
        beliefs found here would be missing."""
        (enabled, checkpoint), (was_enabled, outside) = _place(), self._place
        return checkpoint == outside and (enabled == was_enabled or (self._switches and not is_within()))

    def get(self, value: Any) -> Any:
        """Return the belief of a tensor, None if the tensor was changed in place since; or those of a structure."""
        if isinstance(value, list | tuple):
            return tuple(map(self.get, value))
        if (items := fields_of(value)) is not None:
            return {key: self.get(one) for key, one in items.items()}
        tensor, version, belief = self._known.get(id(value), (None, 0, None))
        return belief if tensor is not None and tensor is value and contract.version(tensor) == version else None

    def put(self, value: Any, belief: Any) -> None:
        """Keep the belief of a tensor in its present version, or those of a structure of tensors."""
        if isinstance(value, Tensor) and belief is not None and not isinstance(belief, dict):
            self._known[id(value)] = (value, contract.version(value), belief)
        elif isinstance(belief, dict) and (items := fields_of(value)) is not None:
            for key, one in belief.items():
                self.put(items.get(key), one)
        elif isinstance(value, list | tuple) and isinstance(belief, list | tuple):
            for one, its in zip(value, belief, strict=False):
                self.put(one, its)

    def through(self, module: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Call a module that takes beliefs with those of its arguments, and keep what it returns. Return y alone."""
        running.flow = None
        try:
            out = module(*args, beliefs=(self.get(args), self.get(kwargs)), **kwargs)
        finally:
            running.flow = self
        y, belief = out[:2]
        self.put(y, belief)
        for position, its in (out.changed or {}).items() if isinstance(out, Returned) else ():
            self.put(args[position], its)
        return y

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if running.flow is not self or not self.is_here():
            return func(*args, **kwargs)
        if func is F.batch_norm and self._batch_norm is not None:
            return self._batch_norm(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _REFLECTED:
            func, args = _REFLECTED[name], args[::-1]
            name = func.__name__
        rule = rule_of(func) or rule_of(_METHODS.get(name, name))
        beliefs = tuple(map(self._get_or_constant, args))  # read now, since `func` may change its arguments in place
        keyword_beliefs = {key: self._get_or_constant(value) for key, value in kwargs.items()}
        given = Operation(None, args, kwargs, beliefs, keyword_beliefs)
        kind, curve, x = "", "", given.argument(0, "input")
        if has_belief((beliefs, keyword_beliefs)):
            kind, (x, curve) = self._kind(func, name, given), _curve(func, name, given)
        version = contract.version(x)
        y = func(*args, **kwargs)
        # The version of an inference tensor does not count in-place changes.
        if name == "__setitem__" or (args and y is args[0] and y.is_inference()):
            self._known.pop(id(args[0]), None)
        if isinstance(y, Tensor) and _only_constants(beliefs) and _only_constants(keyword_beliefs.values()):
            self.put(y, _CONSTANT)
        elif runtime.observer is not None or has_belief((beliefs, keyword_beliefs)):
            operation = Operation(y, args, kwargs, tuple(map(_no_constant, beliefs)), {
                key: _no_constant(value) for key, value in keyword_beliefs.items()
            }, kind)  # fmt: skip
            self.put(y, apply(rule, operation, name))
            if curve and isinstance(y, Tensor) and y is not x:
                self._curve[id(y)] = y, contract.version(y), x, version, curve
        return y

    def _formula(self, value: Tensor, end: object = None) -> tuple[Tensor, int, str]:
        """Return the tensor of which `value` is a function pixel by pixel (`end`, else the earliest), its version, and
        the formula in terms of "x"."""
        now = contract.version(value)
        known = self._curve.get(id(value))
        if value is end or known is None or known[0] is not value or known[1] != now:
            return value, now, "x"
        x, version_of_x, curve = known[2:]
        if contract.version(x) != version_of_x:  # x was changed in place since
            return x, version_of_x, curve.replace("{}", "x")
        root, version, inner = self._formula(x, end)
        return root, version, curve.replace("{}", inner)

    def _kind(self, func: object, name: str, given: Operation) -> str:
        """Return Operation.kind."""
        if func in WEIGHTED:
            return "" if given.belief_of(1, "weight") is _CONSTANT else "computed"
        if not (sign := sign_of(func, _METHODS.get(name, name))):
            return ""
        if given.belief_of(1, "other") is _CONSTANT:
            return "constant second"
        if given.belief_of(0, "input") is _CONSTANT:
            return "constant first"
        first, second = given.argument(0, "input"), given.argument(1, "other")
        if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
            return ""
        for i, (one, other) in enumerate(((first, second), (second, first)) if sign == "*" else ()):
            root, version, formula = self._formula(other, one)
            if root is one and version == contract.version(one) and formula in PRODUCTS:
                return f"product {formula} {i}"
        (root, version, _), (other, other_version, _) = self._formula(first), self._formula(second)
        return "dependent" if root is other and version == other_version else ""

    def _get_or_constant(self, value: object) -> Any:
        return _CONSTANT if isinstance(value, nn.Parameter) else self.get(value)


def _curve(func: object, name: str, given: Operation) -> tuple[Any, str]:
    """Return the argument on which an operation acts pixel by pixel, and its formula; "" if there is no such one."""
    name = _METHODS.get(name, name)
    first, second = given.argument(0, "input"), given.argument(1, "other")
    if not (sign := sign_of(func, name)):
        return first, formula_of(func, name, given.args[1:] or (second,))
    constants = [
        f"constant {id(value)}" if belief is _CONSTANT else value
        for value, belief in ((first, given.belief_of(0, "input")), (second, given.belief_of(1, "other")))
    ]
    if formula := formula_with(sign, constants[1]):
        return first, formula
    return second, formula_with(sign, constants[0], first=True)


def _place() -> tuple[bool, int | None]:
    """Return whether gradients are enabled and which saved-tensor hooks apply: both kinds of checkpoints change one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), id(hooks[0]) if hooks else None


def _only_constants(values: Iterable[object]) -> bool:
    found = list(values)
    return any(value is _CONSTANT for value in found) and all(value is _CONSTANT or value is None for value in found)


def _no_constant(belief: object) -> object:
    return None if belief is _CONSTANT else belief


def follow(forward: Callable[..., Any], module: nn.Module | None, args: Args, kwargs: Kwargs, beliefs: Beliefs) -> Any:
    """Run a forward, or another function (`module` None), unchanged and uncompiled, with beliefs followed by tensor.

    Return what the function returns; Returned if `beliefs` are not None.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_follow, recursive=False)(forward, module, args, kwargs, beliefs)
    return _follow(forward, module, args, kwargs, beliefs)


runtime.follow = follow


def is_followed() -> bool:
    """Say whether the code that calls is a forward whose beliefs are followed by tensor: one that calls a part by
    `self.part.forward(x)`, since `self.part(x)` passes beliefs."""
    return running.flow is not None and running.flow.is_here()


def followed(forward: Callable[..., Any], module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    """Call a part's forward for such code, with the beliefs of its arguments. Return y alone."""
    return running.flow.through(functools.partial(forward, module), args, kwargs)


def _follow(
    forward: Callable[..., Any],
    module: nn.Module | None,
    args: Args,
    kwargs: Kwargs,
    beliefs: Beliefs,
    batch_norm: Callable[..., Any] | None = None,
) -> Any:
    retrace.refuse(module, args)
    switches, loans = _around(class_of(module))
    with Flow(switches, batch_norm) as flow, lending(loans):
        if isinstance(beliefs, Belief | Carried):
            beliefs = ((beliefs,), {})
        if beliefs:
            flow.put(args, beliefs[0])
            flow.put(kwargs, beliefs[1])
        y = forward(*args, **kwargs) if module is None else forward(module, *args, **kwargs)
        if beliefs is None:
            return y
        found = {i: flow.get(value) for i, value in enumerate(args) if isinstance(value, Tensor)}
        return Returned(y, flow.get(y), {i: its for i, its in found.items() if its is not None} or None)


def as_original(base: Any, layer: Any, args: Args, kwargs: Kwargs, beliefs: Beliefs) -> Any:
    """Run the forward of the BatchNorm layer that `layer` replaced, uncompiled; in place of F.batch_norm it calls the
    new normalizer's class, `base`."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_as_original, recursive=False)(base, layer, args, kwargs, beliefs)
    return _as_original(base, layer, args, kwargs, beliefs)


def _as_original(base: Any, layer: Any, args: Args, kwargs: Kwargs, beliefs: Beliefs) -> Any:
    (old,) = layer.__dict__["original"]
    shell = copyreg.__newobj__(type(old))  # type: ignore[attr-defined]
    shell.__dict__ |= {key: layer.__dict__.get(key, value) for key, value in vars(old).items()}
    for kind in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[kind] = {key: getattr(layer, key, None) for key in vars(old)[kind]}
    if "num_batches_tracked" in shell._buffers:  # the new normalizer does the counting
        shell._buffers["num_batches_tracked"] = None

    def batch_norm(*given: Any, **named: Any) -> Any:
        a = BATCH_NORM.bind(*given, **named).arguments
        training = layer.training or shell.running_mean is None
        same = a.get("weight") is shell.weight and a.get("bias") is shell.bias and a.get("eps", 1e-5) == layer.eps
        if not same or a.get("training", False) is not training:
            return F.batch_norm(*given, **named)  # not the layer's own normalization
        flow, running.flow = running.flow, None
        try:
            y, belief = normalized(base, layer, (a["input"],), {}, (flow.get(a["input"]),), {})[:2]
        finally:
            running.flow = flow
        flow.put(y, belief)
        return y

    out = _follow(type(old).forward, shell, args, kwargs, beliefs, batch_norm)
    layer.__dict__.update({key: value for key, value in vars(shell).items() if key not in vars(_NO_PARTS)})
    return out


_NO_PARTS = nn.Module()


def _checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace torch's checkpoint in a forward that runs as it is: beliefs go in and out as plain tensors.

    The recomputation happens after the forward has returned its loans (names.lending): it borrows them again.
    """
    flow, loans = running.flow, lent_now()

    def run(*args: Any, **kwargs: Any) -> Any:
        with lending(loans):
            return function(*args, **kwargs)

    again = function if isinstance(function, nn.Module) else run
    if flow is None or not flow.is_here():
        return CHECKPOINT(again, *args, **kwargs)
    y, belief = checkpointed(again, args, kwargs, flow.get(args), flow.get(kwargs), _call)
    flow.put(y, belief)
    return y


def _call(function: Any, args: Args, kwargs: Kwargs, beliefs: Args, keyword_beliefs: Kwargs) -> Any:
    """Call a checkpoint's function or module with beliefs. Return (y, belief of y, ...)."""
    if isinstance(function, nn.Module):
        return call(function, args, kwargs, beliefs, keyword_beliefs)
    return follow(function, None, args, kwargs, (beliefs, keyword_beliefs))


_known_around: WeakKeyDictionary[type | FunctionType, tuple[Any, bool, list[Loan]]] = WeakKeyDictionary()


def _around(cls: type | FunctionType) -> tuple[bool, list[Loan]]:
    """Return whether a forward, or a function that it calls, switches gradients, and the loans that it needs to run."""
    forward = getattr(cls, "forward", None)  # another one may have been set on the class since it was looked at
    if cls not in _known_around or _known_around[cls][0] is not forward:
        around = Surroundings(cls)
        asking = {id(scope): (scope, "type", class_of) for scope in around.asking}
        checkpointing = {(id(scope), name): (scope, name, _checkpoint) for scope, name in around.checkpointing}
        by_attribute: list[Loan] = [(contract.lent, "class_of", class_of)] if around.asks_class else []
        _known_around[cls] = forward, around.switches, [*asking.values(), *checkpointing.values(), *by_attribute]
    return _known_around[cls][1:]


def stand_ins(cls: type | FunctionType) -> list[Loan]:
    """Return the loans for a forward that runs as it is: what replaces type() and checkpoint() in the functions that
    it may call."""
    return _around(cls)[1]


@torch.no_grad()
def beliefs_of_inputs(model: nn.Module, x: Tensor) -> dict[nn.Module, Belief]:
    """Return the belief of the input of each convolution and linear layer, from the model's parameters alone.

    A normalizer's output is taken to be N(beta, gamma^2), and the table's rules lead from there to the next layers.
    Layers without a normalizer before them, or behind an operation without a rule, are left out.

    Args:
        model: a converted model, which is left as it was.
        x: whole groups of images, of which only the shape matters.
    """
    found: dict[nn.Module, Belief] = {}
    modes = {module: module.training for module in model.modules()}
    hooks = []
    with Flow() as flow:

        def normalized(layer: nn.Module, args: Args, y: Tensor) -> None:
            bias, weight = (getattr(layer, key).detach()[None] for key in ("bias", "weight"))
            flow.put(y, Belief(bias, weight.square()))

        def takes(layer: nn.Module, args: Args) -> None:
            if (belief := channel_belief(flow.get(args[0]))) is not None:
                found[layer] = belief

        for module in model.modules():
            if isinstance(module, GroupedStatistics):
                hooks.append(module.register_forward_hook(normalized))
            elif isinstance(module, Layer):
                hooks.append(module.register_forward_pre_hook(takes))
        try:
            model.eval()(x)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
    return found
