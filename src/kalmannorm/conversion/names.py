"""What the code of a forward names beside its arguments: plain values of its surroundings, which tracing would freeze,
and the class of a layer, which is another one after the conversion."""

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
_DEPTH = 4  # of attributes of attributes
# What no graph has: what a forward asks about the process, writes, or switches.
_ASKS = {"print", "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype"} | {
    *("is_autocast_cpu_enabled", "get_autocast_gpu_dtype", "is_initialized", "get_world_size", "get_rank"),
    *("enable_grad", "set_grad_enabled", "autocast"),  # of which tracing sees nothing where they are so already
}
SWITCHES = {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode"}
_IMPURE = {"os", "time", "datetime"}  # modules whose functions return something else every time
_INSIDE = {property: ".fget", classmethod: ".__func__"}  # where a class's attribute has its function
_CHANGING = (Tensor, set, bytearray, deque, Iterator, torch.Generator, random.Random)


def class_of(value: object) -> type:
    """type(value); of what was converted, that of the original."""
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
    """The class of a layer's class, which equals the original: public code looks layers up, to count or to quantize
    them, by type(layer) == nn.Linear and {nn.Linear: ...}[type(layer)]."""

    def __eq__(cls, other: object) -> bool:
        made = cls.__dict__.get("converted")
        return cls is other or (made is not None and made.original is other)

    def __hash__(cls) -> int:
        made = cls.__dict__.get("converted")
        return type.__hash__(cls if made is None else made.original)


def derived(cls: Any, body: Scope, kind: type) -> Any:
    """A subclass of that name and of the metaclass `kind`, of which no registry of subclasses is told:
    neither by __init_subclass__, which may want arguments, nor by a metaclass."""
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")} | body
    make = abc.ABCMeta.__new__ if isinstance(cls, abc.ABCMeta) else type.__new__
    base = nn.Module if issubclass(cls, nn.Module) else _Nothing
    try:
        made: Any = make(kind, cls.__name__, (base,), body)
        made.__bases__ = (cls,)
    except TypeError:  # of another layout
        return type(cls)(cls.__name__, (cls,), body)
    return made


def plain_parts(expression: str, value: object) -> dict[str, Any]:
    """What is plain of a value, by expressions: all of it, or what a dict or a list has beside other things."""
    if is_plain(value):
        return {expression: value}
    items: Any = ()
    if isinstance(value, dict):
        items = [(key, one) for key, one in value.items() if type(key) in (str, int)]
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return {f"{expression}[{key!r}]": one for key, one in items if is_plain(one)}


def is_plain(value: object) -> bool:
    """Whether it is a number, a word or none; or a list, a tuple, a set or a dict of what is. No subclass is, whose
    repr() is no code (an IntEnum)."""
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    if type(value) in (tuple, list, set, frozenset):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    return type(value) in (bool, int, float, str, type(None))


def may_change(value: object) -> bool:
    """Whether it can become another one in place, which no condition on a graph would see: arrays, generators of
    random numbers, iterators, objects without a __dict__; or holds such."""
    if isinstance(value, dict | list | tuple):
        return any(map(may_change, value.values() if isinstance(value, dict) else value))
    if isinstance(value, _CHANGING):
        return True
    if type(value).__module__.partition(".")[0] == "numpy":
        return not (callable(value) or isinstance(value, numbers.Number))
    return not (hasattr(value, "__dict__") or is_of_library(type(value).__module__))


def is_of_library(module: object) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _globals(code: CodeType) -> frozenset[str]:
    inner = [_globals(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    kinds = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
    return frozenset(str(one.argval) for one in dis.get_instructions(code) if one.opname in kinds).union(*inner)


@functools.cache
def _beyond_a_graph(code: CodeType) -> str:
    """Why a graph would always take one way, where the code has two; or nothing."""
    for before, one in itertools.pairwise(dis.get_instructions(code)):
        if "EXC_MATCH" in one.opname:
            return "it catches exceptions"
        named = getattr(torch, str(before.argval), None)
        if one.opname == "IS_OP" and (named is torch.dtype or isinstance(named, torch.dtype)):
            return "it compares a dtype by `is`"
    return ""


class Kept:
    """Values as they were before something ran, which takes back what it changes."""

    def __init__(self) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._attributes: list[tuple[Any, str, Any]] = []

    def contents(self, value: object) -> None:
        """Of a dict, a list or a set, and of those in it."""
        if isinstance(value, dict | list | set) and id(value) not in self._contents:
            self._contents[id(value)] = value, copy.copy(value)
            for one in tuple(value.values() if isinstance(value, dict) else value):
                self.contents(one)

    def attribute(self, owner: Any, name: str) -> None:
        self._attributes.append((owner, name, owner[name] if isinstance(owner, dict) else getattr(owner, name)))

    def take_back(self) -> bool:
        """Whether something was changed."""
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
    """Of the forward of `cls`, or of a function, and of the functions and methods that it may call; `others`: whose
    methods too.

    `plain`: values by expressions, in which `modules` are names of modules, as generated code knows them. `functions`:
    expressions of functions and classes, which graphs are made of. `asking`: the globals of functions that call type()
    or isinstance(); `asks_class`: whether one reads `layer.__class__`.
    `checkpointing`: where they find torch's checkpoint. `switches`: whether one switches gradients off or on.
    `refused`: why no graph of it would be right, or nothing.
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
        """Note what `base` defines, where code of `cls` may call it (by super() too); of parts, but their forward."""
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
        of = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(value, type) and issubclass(value, torch.autocast):
            self.refused = f"it calls {name}"
        elif of in _IMPURE:
            self.refused = f"it uses {name}, which may be something else the next time"
        elif not is_plain(value) and may_change(value):
            self.refused = f"it reads {name}, a {type(value).__name__}, which may change"

    def _value(self, expression: str, value: Any, names: frozenset[str], depth: int = 0) -> None:
        """`names`: of attributes that may be read."""
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
    """What a function's cell holds, if anything."""
    try:
        return (cell.cell_contents,)
    except ValueError:  # not set yet
        return ()


# --- the classes of layers --------------------------------------------------------------------------------------------


Loan = tuple[Scope, str, Any]  # globals, a name in them, and what it stands for

_lock = threading.Lock()
_lent: dict[tuple[int, str], list[Any]] = {}  # how often, what there was before, and in which globals


def lent_now() -> list[Loan]:
    """What is lent at the moment."""
    with _lock:
        return [(held[2], name, held[2][name]) for (_, name), held in _lent.items()]


@contextmanager
def lending(loans: Iterable[Loan]) -> Iterator[None]:
    """While it lasts, names in the globals of functions stand for something else."""
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
