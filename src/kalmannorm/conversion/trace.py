"""Trace one module's own forward by torch.fx; every module that it calls is a leaf.

Tracing freezes the plain attributes that the forward reads, its options, and whether an argument is a tensor. All of
this is recorded and becomes a condition of the generated forward: where one fails, the original forward runs.
"""

import copy
import inspect
import math
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

from kalmannorm.conversion.names import CHECKPOINT, Plain, Surroundings, lending
from kalmannorm.conversion.operations import make_dict
from kalmannorm.conversion.proxies import Computed, ListArgument, TensorArgument, Untraceable, is_in_place
from kalmannorm.conversion.reading import Reading
from kalmannorm.norm.checkpoints import is_within

IN_SEGMENTS = torch.utils.checkpoint.checkpoint_sequential


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
        reading = Reading(module)
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


# --- the tracer -------------------------------------------------------------------------------------------------------


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
            return Computed(node, self)
        return (ListArgument if str(node.target) in self.passed.lists else TensorArgument)(node, self)

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


# --- the state of the process -----------------------------------------------------------------------------------------


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
