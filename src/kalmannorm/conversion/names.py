"""What the code of a forward names beside its arguments: plain values of its surroundings, which tracing would freeze,
and the class of a layer, which is another one after the conversion."""

import copy
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from kalmannorm.norm.contract import NORMALIZER

CHECKPOINT = torch.utils.checkpoint.checkpoint
Plain = bool | int | float | str | None
Scope = dict[str, Any]  # the globals of a function
_LIBRARIES = {"torch", "kalmannorm", "numpy", *sys.stdlib_module_names} - {"__main__"}
_DEPTH = 4  # of attributes of attributes


def class_of(value: object) -> type:
    """type(value); of what was converted, that of the original."""
    own = getattr(value, "__dict__", {})
    if NORMALIZER in own and "replaced" in own:
        return own["replaced"][0]  # type: ignore[no-any-return]
    kind = type(value)
    kind = kind.__dict__.get("watches", kind)
    made = kind.__dict__.get("converted")
    return kind if made is None else made.original  # type: ignore[no-any-return]


def plain_parts(expression: str, value: object) -> dict[str, Any]:
    """What is plain of a value, by expressions: all of it, or what a dict or a list has beside other things."""
    if is_plain(value):
        return {expression: value}
    items: Any = ()
    if type(value) is dict:
        items = [(key, one) for key, one in value.items() if isinstance(key, str | int)]
    elif type(value) in (list, tuple):
        items = enumerate(value)  # type: ignore[arg-type, var-annotated]
    return {f"{expression}[{key!r}]": one for key, one in items if is_plain(one)}


def is_plain(value: object) -> bool:
    """Whether it is a number, a word or none; or a list, a tuple or a dict of what is."""
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    return isinstance(value, Plain) or (type(value) in (tuple, list) and all(map(is_plain, value)))  # type: ignore[call-overload]


def _is_of_library(module: object) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


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

    `plain`: values by expressions, in which `modules` are names of modules, as generated code knows them. `asking`:
    the globals of functions that call type() or isinstance(); `asks_class`: whether one reads `layer.__class__`.
    `checkpointing`: where they find torch's checkpoint.
    """

    def __init__(self, cls: type | FunctionType, others: Iterable[type] = ()) -> None:
        self.plain: dict[str, Any] = {}
        self.modules: dict[str, tuple[str, str]] = {}
        self.asking: list[Scope] = []
        self.asks_class = False
        self.checkpointing: list[tuple[Scope, str]] = []
        self.homeless = ""  # globals that are of no module
        self.kept = Kept()
        self._seen: set[int] = set()
        self._methods: dict[str, list[tuple[str, FunctionType]]] = {}
        for kind in dict.fromkeys((cls, *others)):
            for base in getattr(kind, "__mro__", ()):
                for name, found in ({} if _is_of_library(base.__module__) else vars(base)).items():
                    function = getattr(found, "fget", found)
                    if isinstance(function, FunctionType) and name != "forward":
                        where = f"_base.{name}" if function is found and getattr(cls, name, None) is found else ""
                        self._methods.setdefault(name, []).append((where, function))
        if isinstance(forward := getattr(cls, "forward", cls), FunctionType):
            self._function("_base.forward", forward)

    def _function(self, expression: str, function: FunctionType) -> None:
        scope = function.__globals__
        if id(function) in self._seen or _is_of_library(scope.get("__name__")):
            return
        self._seen.add(id(function))
        names = _names(function.__code__)
        if names & {"type", "isinstance"} - scope.keys():
            self.asking.append(scope)
        self.asks_class |= "__class__" in names
        self.checkpointing += [(scope, name) for name in names & scope.keys() if scope[name] is CHECKPOINT]
        if names & {"checkpoint", "checkpoint_sequential"}:
            self.checkpointing.append((vars(torch.utils.checkpoint), "checkpoint"))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for i, (name, cell) in enumerate(cells):
            if name != "__class__" and expression and (held := _content(cell)):
                self._value(f"{expression}.__closure__[{i}].cell_contents", held[0], names)
        for i, default in enumerate(function.__defaults__ or ()):
            if expression and isinstance(default, list | dict):
                self._value(f"{expression}.__defaults__[{i}]", default, names)
        for name in sorted(names & scope.keys()):
            written = f"_in_{str(scope.get('__name__')).replace('.', '_')}"
            self._value(f"{written}.{name}", scope[name], names)
            if is_plain(scope[name]):
                self.kept.attribute(scope, name)
            if any(one.startswith(f"{written}.") for one in self.plain):
                self.modules[written] = ("module", str(scope["__name__"]))
                if vars(sys.modules.get(str(scope["__name__"]), self)) is not scope:
                    self.homeless = str(scope["__name__"])
        for name in sorted(names & self._methods.keys()):
            for where, method in self._methods[name]:
                self._function(where, method)

    def _value(self, expression: str, value: Any, names: set[str], depth: int = 0) -> None:
        """`names`: of attributes that may be read."""
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
        return _is_of_library(value.__name__)
    if isinstance(value, type):
        return _is_of_library(value.__module__) or issubclass(value, nn.Module)
    return not hasattr(value, "__dict__") or type(value).__module__.partition(".")[0] in ("torch", "builtins")


def _content(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not set yet
        return ()


# --- the classes of layers --------------------------------------------------------------------------------------------


Loan = tuple[Scope, str, Any]  # globals, a name in them, and what it stands for

_lock = threading.Lock()
_lent: dict[tuple[int, str], list[Any]] = {}  # how often, and what there was before


@contextmanager
def lending(loans: Iterable[Loan]) -> Iterator[None]:
    """While it lasts, names in the globals of functions stand for something else."""
    with _lock:
        for scope, name, value in loans:
            _lent.setdefault((id(scope), name), [0, scope.get(name, _lent)])[0] += 1
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
