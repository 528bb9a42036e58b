"""The classes of converted modules: generated subclasses of their original classes, with forwards that take beliefs.

They have the name, the module and the signature of the original class. Equal code for one class gives one generated
class, so that equal blocks share a forward and a compiled graph.
"""

import copy
import importlib
import inspect
import itertools
import linecache
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from kalmannorm.conversion import runtime
from kalmannorm.conversion.flow import follow, stand_ins
from kalmannorm.conversion.forwards import AS_IT_IS, HELD, HELPERS, SEQUENTIAL, head_of
from kalmannorm.conversion.names import AsOriginal, Scope, derived, is_of_library, lending
from kalmannorm.conversion.write import Summary
from kalmannorm.norm import contract

_serial = itertools.count()
ORIGINAL = "_original"  # key in the names of generated code: the class of the layer that a normalizer replaced
_classes: dict[tuple[object, ...], type[nn.Module]] = {}


class Generated:
    """What a generated class is made from: its base, the code of its forward, the code's names, the module's summary.

    It is pickled in place of the class.
    """

    def __init__(self, base: "type[nn.Module] | Generated", code: str, names: Scope, summary: Summary) -> None:
        self.base, self.code, self.names, self.summary = base, code, names, summary

    def __reduce__(self) -> Any:
        return Generated, (self.base, self.code, self.names, self.summary)

    def __deepcopy__(self, memo: dict[int, object]) -> "Generated":
        return self

    @property
    def original(self) -> type[nn.Module]:
        """The class that the module had before the conversion."""
        return self.base.original if isinstance(self.base, Generated) else self.base

    def on(self, original: Any, code: str = "") -> "Generated":
        """Return the same on another original class. `code`, if given, replaces the code derived from it directly."""
        if isinstance(self.base, Generated):
            return Generated(self.base.on(original, code), self.code, self.names, self.summary)
        return Generated(original, code or self.code, {} if code else self.names, self.summary)

    def make(self) -> type[nn.Module]:
        """Return the class, generated at the first call."""
        base = self.base.make() if isinstance(self.base, Generated) else self.base
        names = tuple(sorted((name, _identity(value)) for name, value in self.names.items()))
        key = id(base), self.code, names
        if key not in _classes:
            scope = {k: importlib.import_module(v[1]) if _is_module_name(v) else v for k, v in self.names.items()}
            scope |= HELPERS | {"_base": base, "_forward": base.forward}
            filename = f"<converted {base.__name__} {next(_serial)}>"
            lines = self.code.splitlines(keepends=True)
            linecache.cache[filename] = (len(self.code), None, lines, filename)  # so that tracebacks show the code
            exec(compile(self.code, filename, "exec"), scope)
            forward: Any = scope["forward"]
            forward.__doc__, forward.__signature__ = base.forward.__doc__, inspect.signature(base.forward)
            forward.__wrapped__ = _without_beliefs(base, scope)
            body = {
                "forward": forward,
                "generated_forward": forward,
                "converted": self,
                "__reduce_ex__": _reduce,
                "apply": _apply,
            }
            body["__class__"] = contract.own_class
            body |= contract.methods(base) if "beliefs" in self.code else {}
            body |= _OF_GRAPH_MODULES if issubclass(base, fx.GraphModule) else {}
            body |= {"children": runtime.children_of} if self.code == SEQUENTIAL else {}
            body |= {"_apply": _refilling(base)} if "known_input(" in self.code else {}
            body |= {"__setattr__": _setting(base, self.names[HELD].split())} if HELD in self.names else {}
            if ORIGINAL in self.names:
                body |= methods_of(self.names[ORIGINAL], base)
            is_layer = base.__module__.startswith("torch.nn.modules.") and self.code != SEQUENTIAL
            _classes[key] = derived(base, body, AsOriginal if is_layer else type(base))
            for value in body.values():
                if getattr(value, "__closure__", None) and "__class__" in value.__code__.co_freevars:
                    cell = value.__closure__[value.__code__.co_freevars.index("__class__")]
                    cell.cell_contents = _classes[key]
        return _classes[key]


def _without_beliefs(cls: type[nn.Module], scope: Scope) -> Any:
    """Return the generated forward with the original's parameters only, as its `__wrapped__`: torch.fx reads that, and
    code that removes a wrapper (accelerate's mixed precision) leaves it as the forward."""
    head, arguments = head_of(cls, scope)
    head, handed = head.replace(", beliefs=None", ""), ", ".join(["self", *arguments.values()])
    exec(f"def plainly({head}):\n    return forward({handed})\n", scope)
    return scope["plainly"]


def _apply(self: Any, fn: Callable[[nn.Module], None]) -> nn.Module:
    """Apply a function to all modules as nn.Module.apply does; type(layer) in that function is the original class."""
    function = getattr(fn, "__func__", fn)
    with lending(stand_ins(function) if isinstance(function, FunctionType) else []):
        return type(self).converted.original.apply(self, fn)  # type: ignore[no-any-return]


def methods_of(original: type[nn.Module], base: type[nn.Module]) -> Scope:
    """Return what a BatchNorm subclass defines beside its forward, for a class derived from the normalizer `base`.

    Left out are names that the normalizer defines and torch's BatchNorm does not: they belong to the normalizer.
    """
    body: Scope = {}
    for cls in reversed(original.__mro__):
        for name, value in {} if is_of_library(cls.__module__) else vars(cls).items():
            if (
                name.startswith("__")
                or name == "forward"
                or (hasattr(base, name) and not hasattr(nn.BatchNorm2d, name))
            ):
                continue
            body[name] = _rebound(value) if isinstance(value, FunctionType) else value
    return body


def _rebound(function: FunctionType) -> FunctionType:
    """Return a copy of a method whose super() refers to a class that is made later: its cell is still empty."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(CellType() if name == "__class__" else cell for name, cell in cells)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__doc__ = function.__kwdefaults__, function.__doc__
    return made


def _setting(base: type[nn.Module], held: list[str]) -> Callable[..., None]:
    """Return a __setattr__ after which the forward runs as it is, if it set an attribute on which the trace relied (a
    function, a method)."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        base.__setattr__(self, name, value)
        if name in held and (made := generated(type(self))) is not None:
            self.__class__ = made.on(made.original, AS_IT_IS).make()

    return __setattr__


def _refilling(base: type[nn.Module]) -> Callable[..., nn.Module]:
    """Return an _apply that restores the given belief of the input where the model leaves the device meta (to_empty):
    no state dict holds its numbers."""

    def _apply(self: nn.Module, *args: Any, **options: Any) -> nn.Module:
        given = self.__dict__.get(contract.MARK, {}).get(contract.GIVEN, ())  # a slice of a Sequential has none
        on_meta = [name for name in given if self._buffers[name].is_meta]  # type: ignore[union-attr]
        base._apply(self, *args, **options)
        for name in on_meta:
            if not (buffer := self._buffers[name]).is_meta:  # type: ignore[union-attr]
                buffer.copy_(torch.tensor(given[name]))  # type: ignore[union-attr]
        return self

    return _apply


def _reduce(self: nn.Module, protocol: object) -> Any:
    return _rebuild, (type(self).converted,), self.__getstate__()  # type: ignore[attr-defined, misc]


def _rebuild(generated: Generated) -> nn.Module:
    cls = generated.make()
    return cls.__new__(cls)  # type: ignore[misc]


# Every GraphModule has a class of its own, whose forward changes with the graph (torchvision's feature extractors have
# one graph for each mode), and is copied by way of its graph.


def _recompile(self: Any) -> Any:
    """Recompile a converted GraphModule: from then on its forward is that of the new graph, and runs as it is."""
    made = type(self).converted
    self.__class__ = made.original
    try:
        return self.recompile()
    finally:
        self.__class__ = made.on(made.original, AS_IT_IS).make()


def _copy_graph_module(self: Any, memo: dict[int, object]) -> nn.Module:
    made = type(self).converted
    copied = made.original.__new__(made.original)
    memo[id(self)] = copied
    state = copy.deepcopy(self.__dict__, memo)
    graph = state.pop("_graph")
    copied.__dict__.update(state)
    copied.graph = graph
    copied.__class__ = made.on(type(copied)).make()
    return copied  # type: ignore[no-any-return]


def _reduce_graph_module(self: Any, protocol: object) -> Any:
    made = type(self).converted
    self.__class__ = made.original
    try:
        return _rebuild_graph_module, (self.__reduce__(), made.on(None, AS_IT_IS))
    finally:
        self.__class__ = made.make()


def _rebuild_graph_module(reduced: Any, made: Generated) -> nn.Module:
    function, arguments = reduced[:2]
    module: nn.Module = function(*arguments)
    module.__class__ = made.on(type(module)).make()
    return module


_OF_GRAPH_MODULES = {
    "recompile": _recompile,
    "__deepcopy__": _copy_graph_module,
    "__reduce_ex__": _reduce_graph_module,
}


def _identity(value: object) -> str:
    plain = isinstance(value, str | int | float | bool | None) or _is_module_name(value)
    return f"{type(value).__name__} {value}" if plain else f"object {id(value)}"


def _is_module_name(value: object) -> bool:
    return isinstance(value, tuple) and value[:1] == ("module",)


def generated(cls: type) -> Generated | None:
    """Return what a class is made from if it is a generated one, else None."""
    return cls.__dict__.get("converted")


def become(module: nn.Module, code: str, names: Scope | None = None, summary: Summary | None = None) -> None:
    """Change a module's class to one generated from this code, derived from its present class."""
    base = generated(type(module)) or type(module)
    made = Generated(base, code, names or {}, summary or Summary())
    if generated(type(module)) is None:
        contract.wrap_hooks(module)
    module.__class__ = made.make()


def restore(module: nn.Module) -> None:
    """Give a module its original class, forward and hooks back."""
    made = generated(type(module))
    if made is not None:
        if isinstance(followed := module.__dict__.get("forward"), Followed):
            module.__dict__["forward"] = followed.forward
        module.__class__ = made.original
        contract.unwrap_hooks(module)


class Followed:
    """A forward that was set on an instance: it runs as it is, with beliefs followed by tensor."""

    takes_beliefs = True

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = self.__wrapped__ = forward

    def __call__(self, *args: Any, beliefs: Any = None, **kwargs: Any) -> Any:
        return follow(self.forward, None, args, kwargs, beliefs)
