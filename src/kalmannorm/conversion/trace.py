"""Trace one module's own forward by torch.fx; every module that it calls is a leaf.

Tracing freezes the plain attributes that the forward reads, its options, and whether an argument is a tensor. All of
this is recorded and becomes a condition of the generated forward: where one fails, the original forward runs.
"""

import copy
import enum
import functools
import inspect
import math
import operator
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kalmannorm.conversion.names import (
    CHECKPOINT,
    Plain,
    Surroundings,
    class_of,
    derived,
    is_of_library,
    is_plain,
    lending,
    may_change,
    plain_parts,
)
from kalmannorm.conversion.operations import make_dict
from kalmannorm.norm.checkpoints import is_within
from kalmannorm.norm.contract import has_call_of_its_own

IN_SEGMENTS = torch.utils.checkpoint.checkpoint_sequential

# Augmented assignments such as x += y, by their names in `operator`: tensors execute them in place.
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod")


def is_in_place(name: str) -> bool:
    """Say whether a function or method of this name changes its first argument."""
    return name.strip("_") in (*IN_PLACE, "setitem") or (name.endswith("_") and not name.endswith("__"))


_DEPTH = 3  # how deep attributes of a module's attributes are watched
# Objects of classes from these packages are not watched.
_NOT_READ = ("builtins", "torch", "collections", "functools", "enum", "random", "numpy")
_OF_MODULES = {*vars(nn.Module())}
_OF_FX = ("_tensor_constant", "__")  # beginnings of attributes that torch.fx and Python look for and set themselves


class Passed(NamedTuple):
    """What the calls in a module's parents show of the module's arguments, by name.

    `lists`: arguments that are lists or tuples in some call; `fixed`: that are the same plain value in every call;
    `given`: that are tensors, other computed values or different ones in some call.
    """

    lists: set[str]
    fixed: dict[str, Plain]
    given: set[str]

    @staticmethod
    def nothing() -> "Passed":
        return Passed(set(), {}, set())


class Trace(NamedTuple):
    """A graph, and the conditions under which it does what the forward does."""

    graph: fx.Graph
    asked: dict[str, str]  # arguments whose type the forward asked for -> what they claimed to be, `tensor` or `list`
    read: dict[str, Plain]  # expressions of plain attributes and globals -> their values
    frozen: dict[str, Plain]  # arguments -> the values that the graph assumes
    of_both: bool = False  # whether the graph is that of training and evaluation: the forward did not ask for the mode
    names: Mapping[str, object] = MappingProxyType({})  # names in `read` and `functions` -> modules that hold globals
    kinds: Mapping[str, type] = MappingProxyType({})  # expressions of layers -> the classes that the forward saw
    held: AbstractSet[str] = frozenset()  # the module's attributes that must not be set: functions, methods, objects
    functions: tuple[str, ...] = ()  # expressions of functions and classes around the forward that must stay the same
    methods: Mapping[str, type] = MappingProxyType({})  # expressions of methods of parts -> the classes they are from
    given: tuple[str, ...] = ()  # arguments that must not be None


_CONDITIONS = {"type", "len", "isinstance", "hasattr", "getattr", "float"}  # the builtins that conditions call
APPENDS = "appends to a list that it was given"


class Untraceable(ValueError):
    """A forward cannot become a graph as it is written."""


def trace(module: nn.Module, passed: Passed) -> dict[str, Trace]:
    """Trace a forward in training mode and, if it asks for the mode, in evaluation. Return {"train": ..., "eval": ...}.

    Raises Untraceable, as trace_mode does, and for an argument by the name of a function that conditions call.
    """
    for name in _CONDITIONS & inspect.signature(type(module).forward).parameters.keys():
        raise Untraceable(f"it has an argument called {name}")
    found = {"train": trace_mode(module, passed, True)}
    return found if found["train"].of_both else {**found, "eval": trace_mode(module, passed, False)}


@torch.enable_grad()  # type: ignore[untyped-decorator]  # so that a forward which disables gradients is noticed
def trace_mode(module: nn.Module, passed: Passed, training: bool) -> Trace:
    """Trace a forward in one mode of the module, and undo all side effects of running it.

    Raises Untraceable: with torch.fx's reason, or because the graph would do something else than the forward (which
    sets attributes or draws random numbers).
    """
    frozen = _frozen(module, passed)
    tracer = Tracer(passed)
    modes, drawn = {m: m.training for m in module.modules()}, _random_state()
    around = Surroundings(type(module), set(map(type, modes)))
    if around.refused:
        raise Untraceable(around.refused)
    outside, constants = copy.deepcopy(around.plain), dict[str, Tensor]()
    try:
        for each in modes:
            each.training = training
        reading = _Reading(module)
        for _, each in reading.objects.values():
            around.kept.contents(vars(each))
        stand_ins = {"type": reading.class_of, "isinstance": reading.isinstance}
        asking = [(scope, *item) for scope in around.asking for item in stand_ins.items()]
        with reading as read, lending(asking), _Constants(module):
            graph = tracer.trace(module, concrete_args=frozen or None)
        if _random_state() != drawn:
            raise Untraceable("it draws random numbers, which would stay the same ever after")
        tracer.check_constants()
        constants = {key: module.__dict__.pop(key) for key in list(vars(module)) if key.startswith("_tensor_constant")}
        if around.kept.take_back():
            raise Untraceable("its forward sets attributes, or what is outside of it")
    except Untraceable:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise Untraceable(first) from error
    finally:
        _restore_random_state(drawn)
        around.kept.take_back()
        module.__dict__.update(constants)
        for each, mode in modes.items():
            each.training = mode
    _erase_frozen(graph, frozen)
    given = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder" and "*" not in str(node.target))
    conditions = tracer.asked, read | outside | tracer.read, frozen
    functions = tuple(dict.fromkeys(around.functions))
    return Trace(
        graph,
        *conditions,
        not reading.asked_mode,
        around.modules,
        reading.kinds,
        reading.held,
        functions,
        reading.methods,
        given,
    )


def _frozen(module: nn.Module, passed: Passed) -> dict[str, Plain]:
    """Return the options that the forward is traced with: the value that all parents pass, or the default if that is
    None or a bool. They decide which operations there are to trace."""
    frozen: dict[str, Plain] = {}
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if name in passed.given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in passed.fixed:
            frozen[name] = passed.fixed[name]
        elif any(parameter.default is default for default in (None, True, False)):
            frozen[name] = parameter.default
    return frozen


def _erase_frozen(graph: fx.Graph, frozen: dict[str, Plain]) -> None:
    """Erase the placeholders of frozen arguments, and the assertions of their values that fx wrote."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target).removesuffix("_1") in frozen:
            for user in list(node.users):
                for assertion in list(user.users):
                    graph.erase_node(assertion)
                graph.erase_node(user)
            graph.erase_node(node)


# --- proxies ----------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """A proxy that records `x += y` as an in-place operation: fx would make it x = x + y, a new tensor that other names
    of x do not see."""

    def _operate(self, name: str, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    def __getattr__(self, name: str) -> "fx.proxy.Attribute":
        return _Attribute(self, name)

    def __hash__(self) -> int:
        raise Untraceable("it looks something up by a value that is not known yet")


class _Attribute(_Proxy, fx.proxy.Attribute):
    def __repr__(self) -> str:  # for instance by "cuda" in str(x.device)
        raise Untraceable("it writes down a value that is not known yet")


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", functools.partialmethod(_Proxy._operate, _name))


class _TensorArgument(_Proxy):
    """An argument that claims to be a tensor when it is asked for its class, and records that it was asked."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.tracer.asked[str(self.node.target)] = "tensor"  # type: ignore[attr-defined]
        return Tensor

    def __getattr__(self, name: str) -> Any:
        # A proxy has every attribute: one that the forward may look for by hasattr() becomes a condition.
        if not (hasattr(Tensor, name) or name.startswith("__") or "*" in str(self.node.target)):
            self.tracer.read[f'hasattr({self.node.target}, "{name}")'] = True  # type: ignore[attr-defined]
        return super().__getattr__(name)


class _ListArgument(_Proxy):
    """An argument that claims to be a list."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.tracer.asked[str(self.node.target)] = "list"  # type: ignore[attr-defined]
        return list


class Tracer(fx.Tracer):
    """Traces one forward: modules are leaves, and what a graph would get wrong is noted or raises Untraceable."""

    proxy_buffer_attributes = True  # values computed from a buffer are computed in every forward, not once

    def __init__(self, passed: Passed) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=(CHECKPOINT, IN_SEGMENTS))
        self._autowrap_search.append(torch.utils.checkpoint)
        self.passed = passed
        self.asked: dict[str, str] = {}
        self.read: dict[str, Plain] = {}
        self._switched = _switched()
        # Constant tensors that the forward creates: the nodes that clone them in each run, by name; and their versions.
        self._made: dict[str, fx.Node] = {}
        self._versions: list[tuple[Tensor, int]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Node:
        if kind == "call_method" and target in ("append", "extend", "insert"):
            raise Untraceable(APPENDS)
        if kind.startswith("call_") and is_within():
            raise Untraceable("it calls a checkpoint by another name")
        if kind.startswith("call_") and _switched() != self._switched:
            raise Untraceable("it switches gradients or autocast off or on within")
        if target is IN_SEGMENTS and isinstance(rest[0][0], list | tuple):
            raise Untraceable("checkpoint_sequential of a list")
        name = target if isinstance(target, str) else target.__name__
        if kind.startswith("call_") and is_in_place(name) and rest[0] and rest[0][0] in self._made.values():
            raise Untraceable("it changes a tensor that it makes")
        return super().create_node(kind, target, *rest, **more)

    def check_constants(self) -> None:
        """Raise Untraceable if the forward changed one of its constant tensors in place."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise Untraceable("it changes a tensor that it makes")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op != "placeholder":
            return _Proxy(node, self)
        return (_ListArgument if str(node.target) in self.passed.lists else _TensorArgument)(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # isinstance would read __class__, which answers Tensor and is recorded
            return a.node
        if isinstance(a, dict) and type(a) is not dict:  # fx would put a plain dict into the graph
            items = {key: self.create_arg(value) for key, value in a.items()}
            if type(a) is OrderedDict:
                return self.create_node("call_function", make_dict, (tuple(items), tuple(items.values())), {})
            return self.create_node("call_function", type(a), (), items)
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        node: Any = super().create_arg(a)
        if not isinstance(a, Tensor) or not node.target.startswith("_tensor_constant"):
            return node
        if node.target not in self._made:
            self._made[node.target] = self.create_node("call_function", torch.clone, (node,), {})
            self._versions.append((a, a._version))
        return self._made[node.target]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            self.path_of_module(m)
        except NameError:  # a module that is created where it is used, nn.ReLU()(x)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _Constants(TorchFunctionMode):
    """A mode that raises Untraceable where a forward computes from parameters or buffers, or asks for their type or
    device, by another way than attributes (`self.parameters()`): the graph would keep the present value."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._constants = {id(value) for value in (*module.parameters(), *module.buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        asks = isinstance(y, Tensor) or getattr(func, "__name__", "") == "__get__"
        if asks and any(id(value) in self._constants for value in tree_leaves(args)):
            raise Untraceable("it uses parameters that it does not find as attributes")
        return y


# --- attributes that are read -----------------------------------------------------------------------------------------


class _Reading:
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
            if type(value) is _Proxy:
                raise Untraceable("it asks for the type of what it computed")
            return value.__class__  # type: ignore[no-any-return]
        self._note(value)
        return class_of(value)

    def isinstance(self, value: object, kinds: Any) -> bool:
        """Replace isinstance() in the forward: record the class of a layer that is asked for."""
        if type(value) is _Proxy:
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
            if name in own or is_plain(static):
                for expression, part in plain_parts(attribute_of(found[0], name), value).items():
                    read.setdefault(expression, copy.deepcopy(part))
            if not (is_plain(value) or id(value) in objects or isinstance(static, property)):
                reading.hold(found[0], name, value)
            return value

        def missing(self: Any, name: str) -> Any:
            try:
                return cls.__getattr__(self, name)  # type: ignore[attr-defined]
            except AttributeError:
                if (found := objects.get(id(self))) is not None and not name.startswith(_OF_FX):
                    read[f'hasattr({found[0]}, "{name}")'] = False
                raise

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


# --- the state of the process ------------------------------------------------------------------------------


def _random_state() -> bytes:
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), numpy.random.get_state()))  # noqa: NPY002


def _restore_random_state(state: bytes) -> None:
    of_torch, of_python, of_numpy = pickle.loads(state)
    torch.set_rng_state(torch.from_numpy(of_torch))
    random.setstate(of_python)
    numpy.random.set_state(of_numpy)  # noqa: NPY002


def _switched() -> tuple[object, ...]:
    """Return the state of the contexts that fx does not record: gradients, inference mode, autocast."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast
