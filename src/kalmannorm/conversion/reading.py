"""Record what a forward reads while it is traced: plain attributes, whose values the graph freezes, and the classes of
layers that it asks for."""

import copy
import enum
import functools
from typing import Any

from torch import Tensor, fx, nn

from kalmannorm.conversion.names import Plain, class_of, derived, is_of_library, is_plain, may_change, plain_parts
from kalmannorm.conversion.proxies import Computed, Untraceable
from kalmannorm.norm.contract import has_call_of_its_own

_DEPTH = 3  # how deep attributes of a module's attributes are watched
# Objects of classes from these packages are not watched.
_NOT_READ = ("builtins", "torch", "collections", "functools", "enum", "random", "numpy")
_OF_MODULES = {*vars(nn.Module())}
_OF_FX = ("_tensor_constant", "__")  # beginnings of attributes that torch.fx and Python look for and set themselves


class Reading:
    """A context that records which plain attributes the code reads: of the module, of the modules in it, and of objects
    that these hold (a configuration)."""

    def __init__(self, module: nn.Module) -> None:
        self.read: dict[str, Plain] = {}
        self.classes: list[tuple[object, type]] = []
        self.objects: dict[int, tuple[str, Any]] = {}
        self.made: dict[type, type] = {}
        self.asked_mode = False
        self.held: set[str] = set()
        self.kinds: dict[str, type] = {}
        self.methods: dict[str, type] = {}
        for path, each in module.named_modules():
            self.objects[id(each)] = expression_of(path), each
        last = list(self.objects.values())
        for _ in range(_DEPTH):
            held = [
                (f"{expression}.{key}", value)
                for expression, each in last
                for key, value in each.__dict__.items()
                if not key.startswith("_")
                and hasattr(value, "__dict__")
                and not isinstance(value, type)
                and type(value).__module__.partition(".")[0] not in _NOT_READ
                and not isinstance(value, enum.Enum)
                and id(value) not in self.objects
            ]
            self.objects |= {id(value): (expression, value) for expression, value in reversed(held)}
            last = held

    def __enter__(self) -> dict[str, Plain]:
        for expression, each in self.objects.values():
            cls = type(each)
            try:
                each.__class__ = self._reading_class(cls)
            except TypeError:  # slots, or the layout of an extension: take all that it holds as read
                for key, value in each.__dict__.items():
                    self.read |= plain_parts(f"{expression}.{key}", value)
                continue
            self.classes.append((each, cls))
        return self.read

    def __exit__(self, *_: object) -> None:
        for each, cls in self.classes:
            each.__class__ = cls

    def class_of(self, value: object, *body: Any, **options: Any) -> type:
        """Replace type() in the forward: record the class of a layer that is asked for."""
        if body:
            return type(value, *body, **options)
        if issubclass(type(value), fx.Proxy):
            if type(value) is Computed:
                raise Untraceable("it asks for the type of what it computed")
            return value.__class__  # type: ignore[no-any-return]
        self._note(value)
        return class_of(value)

    def isinstance(self, value: object, kinds: Any) -> bool:
        """Replace isinstance() in the forward: record the class of a layer that is asked for."""
        if type(value) is Computed:
            raise Untraceable("it asks for the type of what it computed")
        self._note(value)
        return isinstance(value, kinds)

    def hold(self, owner: str, name: str, value: object) -> None:
        """Record that the graph relies on an attribute that is no plain value: it holds until the attribute is set.

        Raises Untraceable: the value may change in place.
        """
        expression = attribute_of(owner, name)
        if owner != "self" and isinstance(value, nn.Module):
            return
        if may_change(value) and not (isinstance(value, Tensor) and owner == "self"):
            raise Untraceable(f"it reads {expression}, a {type(value).__name__}, which may change")
        if isinstance(value, list | tuple | dict):
            self.read[f"len({expression})"] = len(value)
        if owner == "self" and not isinstance(value, nn.Module | Tensor):
            self.held.add(name)
        elif name != "forward" and (function := getattr(value, "__func__", None)):
            kind = class_of(value.__self__)  # type: ignore[attr-defined]
            if getattr(kind, name, None) is function and not is_of_library(function.__module__):
                self.methods[expression] = kind

    def _note(self, value: object) -> None:
        if issubclass(type(value), nn.Module) and id(value) in self.objects:
            self.kinds[self.objects[id(value)][0]] = class_of(value)

    def _reading_class(self, cls: type) -> type:
        """Return a subclass of `cls` whose instances report which of their attributes are read, missed or set."""
        if cls in self.made:
            return self.made[cls]
        reading, read, objects = self, self.read, self.objects

        def getter(self: Any, name: str) -> Any:
            if name == "__class__":
                return class_of(self)
            found, own = objects.get(id(self)), object.__getattribute__(self, "__dict__")
            for of_module in (own.get("_parameters", {}), own.get("_buffers", {})):
                if found is not None and name in of_module:
                    read[f"({attribute_of(found[0], name)} is None)"] = of_module[name] is None
            value = cls.__getattribute__(self, name)  # type: ignore[call-arg]
            if name == "training":
                reading.asked_mode = True
                if found is not None and found[0] != "self":
                    read[f"({found[0]}.training is self.training)"] = True
            if name.startswith("__") or name in _OF_MODULES or found is None:
                return value
            static = own[name] if name in own else next((vars(b)[name] for b in cls.__mro__ if name in vars(b)), None)
            if not isinstance(static, property):  # what a property reads is recorded itself
                for expression, part in plain_parts(attribute_of(found[0], name), value).items():
                    read.setdefault(expression, copy.deepcopy(part))
            if not (is_plain(value) or id(value) in objects or isinstance(static, property)):
                reading.hold(found[0], name, value)
            return value

        def missing(self: Any, name: str) -> Any:
            found = None if name.startswith(_OF_FX) else objects.get(id(self))
            try:
                value = cls.__getattr__(self, name)  # type: ignore[attr-defined]
            except AttributeError:
                if found is not None:
                    read[f'hasattr({found[0]}, "{name}")'] = False
                raise
            if found is not None:
                read.update(copy.deepcopy(plain_parts(attribute_of(found[0], name), value)))
            return value

        def setter(self: Any, name: str, value: object) -> None:
            # Names of these kinds are set by fx and by this class. A forward may set an attribute back at its end (a
            # mode, a momentum), so that a comparison before and after would not show it.
            if id(self) in objects and not name.startswith(_OF_FX):
                raise Untraceable("its forward sets attributes")
            cls.__setattr__(self, name, value)  # type: ignore[call-arg]

        body = {"__getattribute__": getter, "__getattr__": missing, "__setattr__": setter, "watches": cls}
        body["__module__"] = cls.__module__
        if issubclass(cls, nn.Module) and has_call_of_its_own(cls):  # the part's __call__ runs later, not in the trace
            body["__call__"] = lambda part, *args, **kwargs: nn.Module.__call__(part, *args, **kwargs)
        self.made[cls] = derived(cls, body, type(cls))
        return self.made[cls]


def expression_of(path: str) -> str:
    """Return the code that reads a module by its path: `layers.0.bn` is getattr(self.layers, "0").bn."""
    return functools.reduce(attribute_of, path.split(".") if path else (), "self")


def attribute_of(owner: str, name: str) -> str:
    return f"{owner}.{name}" if name.isidentifier() else f'getattr({owner}, "{name}")'
