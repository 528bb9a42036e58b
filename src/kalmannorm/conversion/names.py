"""What a forward's code refers to beside its arguments: globals and closures, whose values tracing would freeze, and
the classes of layers, which the conversion changes."""

import abc
import copy
import dis
import functools
import itertools
import numbers
import random
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from kalmannorm.norm.contract import NORMALIZER

CHECKPOINT = torch.utils.checkpoint.checkpoint
Plain = bool | int | float | str | None
Scope = dict[str, Any]  # the globals of a function
_LIBRARIES = {"torch", "kalmannorm", "numpy", *sys.stdlib_module_names} - {"__main__"}
_DEPTH = 4  # how deep attributes of globals are followed
# Functions that a graph leaves out or freezes: they ask about the process, print, or switch something.
_ASKS = {"print", "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype"} | {
    *("is_autocast_cpu_enabled", "get_autocast_gpu_dtype", "is_initialized", "get_world_size", "get_rank"),
    *("enable_grad", "set_grad_enabled", "autocast"),  # not noticed in a trace where the state is already that
}
SWITCHES = {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode"}
_IMPURE = {"os", "time", "datetime"}  # modules whose functions may return something else every time
_INSIDE = {property: ".fget", classmethod: ".__func__"}  # kind of a class's attribute -> where its function is
_CHANGING = (Tensor, set, bytearray, deque, Iterator, torch.Generator, random.Random)


def class_of(value: object) -> type:
    """Return type(value); for a converted module the class that it had before."""
    own = getattr(value, "__dict__", {})
    if NORMALIZER in own and "replaced" in own:
        return own["replaced"][0]  # type: ignore[no-any-return]
    kind = type(value)
    kind = kind.__dict__.get("watches", kind)
    made = kind.__dict__.get("converted")
    return kind if made is None else made.original  # type: ignore[no-any-return]


class _Nothing:
    pass


class AsOriginal(type):
    """Metaclass of layers' generated classes, which equal the original class: other code looks layers up by
    type(layer) == nn.Linear or {nn.Linear: ...}[type(layer)], to count or to quantize them."""

    def __eq__(cls, other: object) -> bool:
        made = cls.__dict__.get("converted")
        return cls is other or (made is not None and made.original is other)

    def __hash__(cls) -> int:
        made = cls.__dict__.get("converted")
        return type.__hash__(cls if made is None else made.original)


def derived(cls: Any, body: Scope, kind: type) -> Any:
    """Make a subclass of `cls` with the same name and the metaclass `kind`, unnoticed by registries of subclasses:
    neither an __init_subclass__, which may want arguments, nor a metaclass of the model's own runs."""
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")} | body
    make = abc.ABCMeta.__new__ if isinstance(cls, abc.ABCMeta) else type.__new__
    base = nn.Module if issubclass(cls, nn.Module) else _Nothing
    try:
        made: Any = make(kind, cls.__name__, (base,), body)
        made.__bases__ = (cls,)
    except TypeError:  # instances of `cls` have another memory layout, so that the bases cannot be exchanged
        return type(cls)(cls.__name__, (cls,), body)
    return made


def plain_parts(expression: str, value: object) -> dict[str, Any]:
    """Return {expression: plain value}: the value itself if it is plain, else the plain items of a dict or a list."""
    if is_plain(value):
        return {expression: value}
    items: Any = ()
    if isinstance(value, dict):
        items = [(key, one) for key, one in value.items() if type(key) in (str, int)]
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return {f"{expression}[{key!r}]": one for key, one in items if is_plain(one)}


def is_plain(value: Any, within: tuple[int, ...] = ()) -> bool:
    """Say whether a value is a bool, a number, a string or None, or a list, tuple, set or dict of plain values.

    Instances of subclasses are not plain: their repr() may be no code (an IntEnum's). Nor is a container inside of
    itself, whose ids are `within`.
    """
    if type(value) in (dict, tuple, list, set, frozenset):
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        return id(value) not in within and all(is_plain(part, (*within, id(value))) for part in parts)
    return type(value) in (bool, int, float, str, type(None))


def may_change(value: object, within: tuple[int, ...] = ()) -> bool:
    """Say whether a value can change in place unseen by a graph's conditions, or holds one that can: tensors, arrays,
    sets, random generators, iterators, objects without a __dict__; or a container inside of itself (`within`: ids)."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return id(value) in within or any(may_change(part, (*within, id(value))) for part in parts)
    if isinstance(value, _CHANGING):
        return True
    if type(value).__module__.partition(".")[0] == "numpy":
        return not (callable(value) or isinstance(value, numbers.Number))
    return not (hasattr(value, "__dict__") or is_of_library(type(value).__module__))


def is_of_library(module: object) -> bool:
    """Say whether a module's name is one of torch, numpy, the standard library or this package."""
    return str(module).partition(".")[0] in _LIBRARIES


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in the code of a function and of functions inside of it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _globals(code: CodeType) -> frozenset[str]:
    """Return only the names of globals in such code."""
    inner = [_globals(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    kinds = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
    return frozenset(str(one.argval) for one in dis.get_instructions(code) if one.opname in kinds).union(*inner)


@functools.cache
def _beyond_a_graph(code: CodeType) -> str:
    """Return why a graph would always take one of two branches in the code; "" if there is no such branch."""
    for before, one in itertools.pairwise(dis.get_instructions(code)):
        if "EXC_MATCH" in one.opname:
            return "it catches exceptions"
        named = getattr(torch, str(before.argval), None)
        if one.opname == "IS_OP" and (named is torch.dtype or isinstance(named, torch.dtype)):
            return "it compares a dtype by `is`"
    return ""


class Kept:
    """Values as they were before a forward ran, to undo what the forward changes."""

    def __init__(self) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._attributes: list[tuple[Any, str, Any]] = []

    def contents(self, value: object) -> None:
        """Keep the contents of a dict, a list or a set, and of those inside of it."""
        if isinstance(value, dict | list | set) and id(value) not in self._contents:
            self._contents[id(value)] = value, copy.copy(value)
            for one in tuple(value.values() if isinstance(value, dict) else value):
                self.contents(one)

    def attribute(self, owner: Any, name: str) -> None:
        """Keep an object's attribute, or a dict's item."""
        self._attributes.append((owner, name, owner[name] if isinstance(owner, dict) else getattr(owner, name)))

    def take_back(self) -> bool:
        """Restore everything that was kept. Return whether something had changed."""
        changed = False
        for value, was in self._contents.values():
            if _identities(value) != _identities(was):
                changed = True
                value.clear()
                value.extend(was) if isinstance(value, list) else value.update(was)
        for owner, name, was in self._attributes:
            if (owner[name] if isinstance(owner, dict) else getattr(owner, name)) is not was:
                changed = True
                owner.__setitem__(name, was) if isinstance(owner, dict) else setattr(owner, name, was)
        return changed


def _identities(value: Any) -> list[Any]:
    return [*value, *map(id, value.values())] if isinstance(value, dict) else [id(one) for one in value]


class Surroundings:
    """What a forward, and the functions and methods that it may call, refer to outside of their arguments.

    Args:
        cls: the class whose forward is examined, or a function.
        others: classes whose methods the forward may call too.

    Attributes:
        plain: expressions -> plain values of globals, closures and defaults.
        modules: names in these expressions -> the modules that they stand for, as generated code gets them.
        functions: expressions of the functions and classes that the forward uses.
        asking: globals of the functions that call type() or isinstance().
        asks_class: whether one reads `layer.__class__`.
        checkpointing: (globals, name) under which torch's checkpoint is found.
        switches: whether one switches gradients off or on.
        refused: why no graph would do what the forward does, or "".
        kept: the values outside of the forward that it may change.
    """

    def __init__(self, cls: type | FunctionType, others: Iterable[type] = ()) -> None:
        self.plain: dict[str, Any] = {}
        self.modules: dict[str, tuple[str, str]] = {}
        self.functions: list[str] = []
        self.asking: list[Scope] = []
        self.asks_class = False
        self.checkpointing: list[tuple[Scope, str]] = []
        self.switches = False
        self.refused = ""
        self.kept = Kept()
        self._seen: set[int] = set()
        self._methods: dict[str, list[tuple[str, FunctionType]]] = {}
        for base in getattr(cls, "__mro__", ()):
            self._methods_of(base, cls)
        for base in dict.fromkeys(base for kind in others for base in kind.__mro__):
            self._methods_of(base)
        if isinstance(forward := getattr(cls, "forward", cls), FunctionType):
            self._function("_base.forward", forward)

    def _methods_of(self, base: type, cls: Any = None) -> None:
        """Note the methods that `base` defines and code of `cls` may call, by super() too. Without `cls`, `base` is a
        part's class, whose own forward does not count."""
        for name, found in ({} if is_of_library(base.__module__) else vars(base)).items():
            inner = _INSIDE.get(type(found), "")
            function = getattr(found, "__func__", getattr(found, "fget", found))
            if not isinstance(function, FunctionType) or (name == "forward" and cls in (base, None)):
                continue
            where = ""
            if cls is not None:
                first = next(one for one in cls.__mro__ if name in vars(one)) is base
                where = f"_base.{name}{inner}" if first else f"_base.__mro__[{cls.__mro__.index(base)}].{name}{inner}"
            self._methods.setdefault(name, []).append((where, function))

    def _function(self, expression: str, function: FunctionType) -> None:
        """Examine a function, and what it refers to and may call. `expression` is "" where no code can name it."""
        scope = function.__globals__
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        if is_of_library(scope.get("__name__")):
            if isinstance(wrapped := getattr(function, "__wrapped__", None), FunctionType):
                self._function("", wrapped)
                if scope["__name__"] in ("torch.utils._contextlib", "torch.amp.autocast_mode"):  # @torch.no_grad()
                    self.switches, self.refused = True, f"{function.__name__} is decorated by {scope['__name__']}"
            return
        names = _names(function.__code__)
        self.switches |= bool(names & SWITCHES)
        self.refused = _beyond_a_graph(function.__code__) or self.refused
        for name in sorted(names & _ASKS):
            self.refused = f"it calls {name}"
        if names & {"type", "isinstance"} - scope.keys():
            self.asking.append(scope)
        self.asks_class |= "__class__" in names
        of_scope = sorted(_globals(function.__code__) & scope.keys())
        self.checkpointing += [(scope, name) for name in of_scope if scope[name] is CHECKPOINT]
        if names & {"checkpoint", "checkpoint_sequential"}:
            self.checkpointing.append((vars(torch.utils.checkpoint), "checkpoint"))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for i, (name, cell) in enumerate(cells):
            if name != "__class__" and expression and (held := content(cell)):
                self._value(f"{expression}.__closure__[{i}].cell_contents", held[0], names)
                self._refuse_impure(name, held[0])
        for i, default in enumerate(function.__defaults__ or ()):
            if expression and isinstance(default, list | dict):
                self._value(f"{expression}.__defaults__[{i}]", default, names)
        for name in of_scope:
            written = f"_in_{str(scope.get('__name__')).replace('.', '_')}"
            self._value(f"{written}.{name}", scope[name], names)
            self._refuse_impure(name, scope[name])
            if is_plain(scope[name]):
                self.kept.attribute(scope, name)
            if any(one.startswith(f"{written}.") for one in (*self.plain, *self.functions)):
                self.modules[written] = ("module", str(scope["__name__"]))
                if vars(sys.modules.get(str(scope["__name__"]), self)) is not scope:
                    self.refused = f"it reads globals of {scope['__name__']}, which is no module that can be imported"
        for name in sorted(names & self._methods.keys()):
            for where, method in self._methods[name]:
                self.functions += [where] if where else []
                self._function(where, method)

    def _refuse_impure(self, name: str, value: Any) -> None:
        """Set `refused` if a value that the code refers to by `name` may be different in the next forward."""
        of = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(value, type) and issubclass(value, torch.autocast):
            self.refused = f"it calls {name}"
        elif of in _IMPURE:
            self.refused = f"it uses {name}, which may be something else the next time"
        elif not is_plain(value) and may_change(value):
            self.refused = f"it reads {name}, a {type(value).__name__}, which may change"

    def _value(self, expression: str, value: Any, names: frozenset[str], depth: int = 0) -> None:
        """Note a value that a function refers to by this expression. `names`: the attributes that the code may read."""
        if isinstance(value, FunctionType | BuiltinFunctionType | type) and value is not CHECKPOINT:
            self.functions.append(expression)
        if isinstance(value, FunctionType):
            self._function(expression, value)
        elif parts := plain_parts(expression, value):
            self.plain |= parts
            self.kept.contents(value)
        elif depth < _DEPTH and not isinstance(value, nn.Module | Tensor) and not _is_library(value):
            is_object = not isinstance(value, type | ModuleType)
            if is_object:
                self.kept.contents(vars(value))
            for name in sorted(names & set(dir(value))):
                if not name.startswith("__"):
                    self._value(f"{expression}.{name}", getattr(value, name, None), names, depth + 1)
                    if not is_object and name in vars(value):
                        self.kept.attribute(value, name)


def _is_library(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return is_of_library(value.__name__)
    if isinstance(value, type):
        return is_of_library(value.__module__)
    return not hasattr(value, "__dict__") or type(value).__module__.partition(".")[0] in ("torch", "builtins")


def content(cell: Any) -> tuple[Any, ...]:
    """Return what a cell of a function's closure holds, as a tuple of one, or () if it is empty."""
    try:
        return (cell.cell_contents,)
    except ValueError:  # the cell is empty
        return ()


# --- the classes of layers --------------------------------------------------------------------------------------------


Loan = tuple[Scope, str, Any]  # a function's globals, a name in them, and what it stands for meanwhile

_lock = threading.Lock()
# (id of the globals, name) -> number of loans, the value before them (_lent itself: none), the globals.
_lent: dict[tuple[int, str], list[Any]] = {}


def lent_now() -> list[Loan]:
    """Return the loans in force at the moment."""
    with _lock:
        return [(held[2], name, held[2][name]) for (_, name), held in _lent.items()]


@contextmanager
def lending(loans: Iterable[Loan]) -> Iterator[None]:
    """Lend values: names in the globals of functions stand for something else until the context ends."""
    with _lock:
        for scope, name, value in loans:
            _lent.setdefault((id(scope), name), [0, scope.get(name, _lent), scope])[0] += 1
            scope[name] = value
    try:
        yield
    finally:
        with _lock:
            for scope, name, _ in loans:
                held = _lent[id(scope), name]
                held[0] -= 1
                if not held[0]:
                    del _lent[id(scope), name]
                    if held[1] is _lent:
                        del scope[name]
                    else:
                        scope[name] = held[1]
