"""The torch.fx graph of one module's own forward: every module that it calls is a leaf.

What tracing freezes (plain attributes that the forward read, options, whether an argument is a tensor) is noted, and
becomes a condition under which the generated forward holds.
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

# Augmented assignments, x += y, by their names in `operator`: tensors do them in place.
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod")


def is_in_place(name: str) -> bool:
    """Whether the function or method of this name changes its first argument."""
    return name.strip("_") in (*IN_PLACE, "setitem") or (name.endswith("_") and not name.endswith("__"))


_DEPTH = 3  # of attributes of a module's attributes
_NOT_READ = ("builtins", "torch", "collections", "functools", "enum", "random", "numpy")  # modules of objects
_OF_MODULES = {*vars(nn.Module())}


class Passed(NamedTuple):
    """What is known of a module's arguments from the calls in its parents, by name.

    `lists`: those that are lists or tuples; `fixed`: those that are the same plain value in every call; `given`: those
    that are tensors, or something computed, in some call.
    """

    lists: set[str]
    fixed: dict[str, Plain]
    given: set[str]

    @staticmethod
    def nothing() -> "Passed":
        return Passed(set(), {}, set())


class Trace(NamedTuple):
    """A graph and the conditions under which it is what the forward does."""

    graph: fx.Graph
    asked: dict[str, str]  # arguments that were asked whether they are a `tensor` or a `list`, and said yes
    read: dict[str, Plain]  # plain attributes and globals, by the expression that reads them
    frozen: dict[str, Plain]  # arguments that the graph takes for these values
    of_both: bool = False  # whether the forward did not ask which mode it is in
    names: Mapping[str, object] = MappingProxyType({})  # what those expressions name: modules of globals
    kinds: Mapping[str, type] = MappingProxyType({})  # classes of layers that it asked for, by the layer's expression
    held: AbstractSet[str] = frozenset()  # attributes of the module that it takes for what they are: functions, methods
    functions: tuple[str, ...] = ()  # the same of its surroundings, by expressions
    methods: Mapping[str, type] = MappingProxyType({})  # those of its parts that it calls, and of which class they are
    given: tuple[str, ...] = ()  # arguments that are not None


APPENDS = "appends to a list that it was given"


class Untraceable(ValueError):
    """The forward as it is written cannot become a graph."""


def trace(module: nn.Module, passed: Passed) -> dict[str, Trace]:
    """Trace a forward in the modes `train` and, if that differs, `eval`. Raises Untraceable: as of trace_mode."""
    found = {"train": trace_mode(module, passed, True)}
    return found if found["train"].of_both else {**found, "eval": trace_mode(module, passed, False)}


@torch.enable_grad()  # type: ignore[untyped-decorator]  # so that a forward is seen to switch them off
def trace_mode(module: nn.Module, passed: Passed, training: bool) -> Trace:
    """Trace a forward in one mode of the module. Whatever that leaves behind is taken back.

    Raises Untraceable: with fx's reason, or because the graph would not do what the forward does (it sets attributes,
    draws random numbers).
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
    """Options, which decide what there is to trace: as all parents pass them, or their defaults."""
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
    """Their placeholders, and the assertions of their values that fx wrote."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target).removesuffix("_1") in frozen:
            for user in list(node.users):
                for assertion in list(user.users):
                    graph.erase_node(assertion)
                graph.erase_node(user)
            graph.erase_node(node)


# --- proxies ----------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """fx traces `x += y` as x = x + y, a new tensor, which other names of x do not see: here it stays in place."""

    def _operate(self, name: str, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    def __getattr__(self, name: str) -> "fx.proxy.Attribute":
        return _Attribute(self, name)

    def __hash__(self) -> int:
        raise Untraceable("it looks something up by a value that is not known yet")


class _Attribute(_Proxy, fx.proxy.Attribute):
    def __repr__(self) -> str:  # "cuda" in str(x.device)
        raise Untraceable("it writes down a value that is not known yet")


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", functools.partialmethod(_Proxy._operate, _name))


class _TensorArgument(_Proxy):
    """An argument that says it is a tensor when it is asked."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.tracer.asked[str(self.node.target)] = "tensor"  # type: ignore[attr-defined]
        return Tensor

    def __getattr__(self, name: str) -> Any:
        if not (hasattr(Tensor, name) or name.startswith("__") or "*" in str(self.node.target)):  # it may ask for it
            self.tracer.read[f'hasattr({self.node.target}, "{name}")'] = True  # type: ignore[attr-defined]
        return super().__getattr__(name)


class _ListArgument(_Proxy):
    """One that says it is a list."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.tracer.asked[str(self.node.target)] = "list"  # type: ignore[attr-defined]
        return list


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is made of a buffer is made of it in every forward, not once

    def __init__(self, passed: Passed) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=(CHECKPOINT, IN_SEGMENTS))
        self._autowrap_search.append(torch.utils.checkpoint)
        self.passed = passed
        self.asked: dict[str, str] = {}
        self.read: dict[str, Plain] = {}
        self._switched = _switched()
        # Tensors that the forward makes of nothing: copies of them in every run, by their names; and their versions.
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
        if any(tensor._version != version for tensor, version in self._versions):
            raise Untraceable("it changes a tensor that it makes")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op != "placeholder":
            return _Proxy(node, self)
        return (_ListArgument if str(node.target) in self.passed.lists else _TensorArgument)(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # isinstance would ask what it says it is
            return a.node
        if isinstance(a, dict) and type(a) is not dict:  # fx would make a plain dict of it
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
        except NameError:  # made where it is used, nn.ReLU()(x)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _Constants(TorchFunctionMode):
    """While it lasts, nothing may be computed of parameters and buffers alone, nor their type or device be asked for,
    by whatever way the forward found them (`self.parameters()`): a graph would have the value of now."""

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
    """While it lasts, plain attributes that the code reads are noted: of the module, of modules in it, and of plain
    objects that these hold (a configuration)."""

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
            except TypeError:  # slots, an extension's own layout: whatever it holds may be read
                for key, value in each.__dict__.items():
                    self.read |= plain_parts(f"{expression}.{key}", value)
                continue
            self.classes.append((each, cls))
        return self.read

    def __exit__(self, *_: object) -> None:
        for each, cls in self.classes:
            each.__class__ = cls

    def class_of(self, value: object, *body: Any, **options: Any) -> type:
        """type(value), in the forward: of a layer it is noted."""
        if body:
            return type(value, *body, **options)
        if issubclass(type(value), fx.Proxy):
            if type(value) is _Proxy:
                raise Untraceable("it asks for the type of what it computed")
            return value.__class__  # type: ignore[no-any-return]
        self._note(value)
        return class_of(value)

    def isinstance(self, value: object, kinds: Any) -> bool:
        """As the builtin, in the forward: of a layer it is noted."""
        if type(value) is _Proxy:
            raise Untraceable("it asks for the type of what it computed")
        self._note(value)
        return isinstance(value, kinds)

    def hold(self, owner: str, name: str, value: object) -> None:
        """What is no plain value is taken for what it is, until the attribute is set."""
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
                if (found := objects.get(id(self))) is not None and not name.startswith("__"):
                    read[f'hasattr({found[0]}, "{name}")'] = False
                raise

        def setter(self: Any, name: str, value: object) -> None:
            if id(self) in objects and not name.startswith(("_tensor_constant", "__")):  # which fx and this set
                raise Untraceable("its forward sets attributes")  # and may set them back: a mode, a momentum
            cls.__setattr__(self, name, value)  # type: ignore[call-arg]

        body = {"__getattribute__": getter, "__getattr__": missing, "__setattr__": setter, "watches": cls}
        body["__module__"] = cls.__module__
        if issubclass(cls, nn.Module) and has_call_of_its_own(cls):  # which runs where the part is called
            body["__call__"] = lambda part, *args, **kwargs: nn.Module.__call__(part, *args, **kwargs)
        self.made[cls] = derived(cls, body, type(cls))
        return self.made[cls]


def expression_of(path: str) -> str:
    """self.layers[0].bn as code: getattr(self.layers, "0").bn."""
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
    """What the contexts that fx does not see have switched."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast
