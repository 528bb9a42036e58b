"""What a forward names beside its arguments is what it is when the forward runs: globals, classes of layers."""

import copy
import itertools
import os  # noqa: F401
import random
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from types import MethodType
from typing import Any

import numpy
import pytest
import torch
from helpers import conv3x3
from torch import Tensor, nn
from written import Net, changes_alike, same, written

from kalmannorm import belief_report, convert
from kalmannorm.conversion import untraced

switched_off = torch.autocast
RATE, SETTINGS, LOG, CALLS = 1.0, {"rate": 1.0, "act": nn.ReLU}, list[int](), 0


class Config:
    rate = 1.0


CONFIG = Config()


def scaled(x: Tensor) -> Tensor:
    return x * RATE


def outer(x: Tensor) -> Tensor:
    return 2 * scaled(x)


activation = torch.relu


def by_default(x: Tensor, rates: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return x * rates[0]


def is_convolution(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d


def net(code: str) -> Net:
    return written(code, globals())


# --- classes ---


@pytest.mark.parametrize("norm", ["bn", "bkn"])
@pytest.mark.parametrize(
    "asks",
    [
        "type(self.conv) is nn.Conv2d",
        "type(self.bn) == nn.BatchNorm2d",
        "type(self.bn) in (nn.BatchNorm2d, nn.Linear)",
        "{nn.BatchNorm2d: True}.get(type(self.bn))",
        "is_convolution(self.conv)",
        "type(self).__name__ == 'Written' and self.conv.__class__ is nn.Conv2d",
        "x.sum() < 1e9 and type(self.conv) is nn.Conv2d and is_convolution(self.conv)",
        "x.sum() < 1e9 and self.conv.__class__ is nn.Conv2d and self.bn.__class__.__name__ == 'BatchNorm2d'",
        "x.sum() < 1e9 and self.__class__.__name__ == 'Written' and 'Sequential' in str(self.blocks[0].__class__)",
        "type(x) is not tuple and isinstance(x, Tensor)",
    ],
)
def test_a_layer_is_of_its_own_class(asks: str, norm: str) -> None:
    torch.manual_seed(0)
    model = net(f"return 2 * x if {asks} else x")
    assert (same(model, norm)(x := torch.randn(2, 3, 6, 6)).norm() / model.bn(model.conv(x)).norm()).item() == 2
    assert "type" not in globals() and "isinstance" not in globals()


def test_a_replaced_layer_is_asked_for_its_class_again() -> None:
    model = net("return x.flatten(1) if isinstance(self.head, nn.Identity) else self.head(x)")
    converted = same(model)
    model.head = converted.head = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(converted(x), model(x)) and converted(x).dim() == 2


# --- plain values ---


def set_global(model: Any) -> None:
    global RATE
    RATE = 5.0


CHANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a global": ("return x * RATE", set_global),
    "a branch of it": ("return x if RATE > 1 else -x", set_global),
    "a function's": ("return scaled(x)", set_global),
    "a dict": ("return x * SETTINGS['rate']", lambda _: SETTINGS.update(rate=5.0)),
    "an object": ("return x * CONFIG.rate", lambda _: setattr(CONFIG, "rate", 5.0)),
    "a class": ("return x * Config.rate", lambda _: setattr(Config, "rate", 5.0)),
    "a default": ("return by_default(x)", lambda _: by_default.__defaults__[0].__setitem__(0, 5.0)),  # type: ignore[index]
    "a namespace": ("return x * self.settings.rate", lambda model: setattr(model.settings, "rate", 5.0)),
    "dicts in a dict": ("return x * self.nested['a']['rate']", lambda model: model.nested["a"].update(rate=5.0)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_forward_reads_is_read_when_it_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RATE", 1.0)
    monkeypatch.setitem(SETTINGS, "rate", 1.0)
    monkeypatch.setattr(Config, "rate", 1.0)
    monkeypatch.setattr(CONFIG, "rate", 1.0)
    monkeypatch.setattr(by_default, "__defaults__", ([1.0],))
    code, change = CHANGES[kind]
    changes_alike(net(code), change)


def test_what_a_function_closes_over_is_read_when_it_runs() -> None:
    box = {"rate": 1.0}

    class Closing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * box["rate"]

    converted, x = same(model := Closing(lambda *_: None).eval()), torch.randn(2, 3, 6, 6)
    box["rate"] = 5.0
    torch.testing.assert_close(converted(x), model(x))


class Elsewhere(Net):
    """Keeps one rate in a slot, and others where its __getattr__ finds them."""

    __slots__ = ("rate",)

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["rates"][name] if name in self.__dict__.get("rates", ()) else super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rate": self.rate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rate = state.pop("rate")
        super().__setstate__(state)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.rate * self.other_rate


def test_attributes_that_stand_elsewhere_are_read_when_it_runs() -> None:
    model, x = Elsewhere(None).eval(), torch.randn(2, 3, 6, 6)  # type: ignore[arg-type]
    model.rate, model.rates = 2.0, {"other_rate": 1.0}
    converted = same(model)
    for change in (lambda m: setattr(m, "rate", 3.0), lambda m: m.rates.update(other_rate=5.0)):
        for each in (model, converted):
            change(each)
        torch.testing.assert_close(converted(x), model(x))


def test_containers_may_hold_themselves() -> None:
    around: dict[str, Any] = {"rate": 1.0}
    around["around"] = around

    class Around(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * around["rate"] * self.own["rate"]

    model = Around(lambda *_: None).eval()
    model.own = dict(around)
    model.own["around"] = model.own
    converted, x = same(model), torch.randn(2, 3, 6, 6)
    around["rate"] = 5.0
    for each in (model, converted):
        each.own["rate"] = 3.0
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize(
    "code",
    [
        "self.state['n'] += 1\nreturn x * self.state['n']",
        "global CALLS\nCALLS += 1\nreturn x * CALLS",
        "LOG.append(1)\nreturn x * len(LOG)",
        "CONFIG.calls = getattr(CONFIG, 'calls', 0) + 1\nreturn x * CONFIG.calls",
    ],
)
def test_what_a_forward_changes_is_changed_in_every_run_and_not_by_convert(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "CALLS", 0)
    monkeypatch.setitem(globals(), "LOG", [])
    monkeypatch.setitem(globals(), "CONFIG", Config())
    converted, x = convert(net(code), "bkn", stat_batch=2), torch.randn(2, 3, 6, 6)
    once = converted(x)
    torch.testing.assert_close(converted(x), 2 * once)
    assert "sets attributes" in untraced(converted)[""]


UNSEEN = {
    "numpy's generator": "return x if numpy.random.rand() < 0.5 else -x",
    "a generator": "return x if self.drawing.random() < 0.5 else -x",
    "an iterator": "return x * next(self.numbers)",
    "a deque": "NUMBERS.append(len(NUMBERS) + 1.0)\nreturn x * NUMBERS[-1]",
    "a class's attribute": "Net.calls += 1\nreturn x * Net.calls",
    "the environment": "os.environ['CALLS'] = os.environ.get('CALLS', '') + 'I'\nreturn x * len(os.environ['CALLS'])",
    "a tensor": "global RATES\nRATES = RATES + 1\nreturn x * RATES",
    "a sum": "y = torch.zeros(1)\nfor b in self.blocks: y += b(x).mean()\nreturn x * y",
    "a sum by a method": "y = torch.zeros(4, 1, 1)\ny.add_(x.mean((0, 2, 3))[:, None, None])\nreturn x * y",
    "a filled tensor": "y = torch.zeros(2, 4, 6, 6)\ny[:, :2] = x[:, :2]\nreturn self.head(y)",
    "whether gradients are on": "return x if torch.is_grad_enabled() else -x",
    "a mode for a while": "self.bn.train()\nx = self.bn(x)\nself.bn.eval()\nreturn x",
    "an eps for a while": "self.bn.eps = 1.0\nx = self.bn(x)\nself.bn.eps = 1e-5\nreturn x",
}
NUMBERS, RATES = deque([1.0]), torch.ones(1)


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_no_graph_has_runs_as_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLS", "")
    converted, x = convert(model := net(UNSEEN[kind]), "bkn", stat_batch=2), torch.randn(2, 3, 6, 6)
    assert untraced(converted)
    found = []
    for each in (model, converted):
        numpy.random.seed(0)  # noqa: NPY002
        each.drawing, each.numbers = random.Random(0), itertools.count(1)
        monkeypatch.setattr(Net, "calls", 0)
        monkeypatch.setenv("CALLS", "")
        monkeypatch.setitem(globals(), "NUMBERS", deque([1.0]))
        monkeypatch.setitem(globals(), "RATES", torch.ones(1))
        with torch.no_grad():
            found.append([each(x) for _ in range(4)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("what", ["torch.autocast('cpu', enabled=False)", "switched_off('cpu', enabled=False)"])
def test_autocast_is_switched_off_where_nothing_else_is(what: str) -> None:
    """Which changes nothing where convert runs."""
    model = net(f"x = self.head(x)\nwith {what}:\n    return self.blocks[0](x.float())")
    converted, x = convert(model, "bkn", stat_batch=2), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(x).dtype == model(x).dtype
        torch.testing.assert_close(converted(x), model(x))


def test_gradients_are_switched_off_also_after_a_conversion_without_them() -> None:
    with torch.no_grad():
        converted = convert(net("with torch.no_grad(): x = self.head(x)\nreturn self.blocks[0](x)"), "bkn")
    converted(torch.randn(2, 3, 6, 6)).sum().backward()
    assert converted.head.weight.grad is None and converted.blocks[0][0].weight.grad is not None  # type: ignore[union-attr, index]


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_an_attribute_that_is_set_later_is_found(norm: str) -> None:
    code = "return x * (self.settings.late if hasattr(self.settings, 'late') else getattr(self, 'later', 1.0))"
    model, x = net(code), torch.randn(2, 3, 6, 6)
    converted = same(model, norm)
    for each in (model, converted):
        each.later = 3.0  # type: ignore[assignment]
    torch.testing.assert_close(converted(x), model(x))
    for each in (model, converted):
        each.settings.late = 5.0  # type: ignore[union-attr]
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("decorated", [False, True])
def test_gradients_and_autocast_are_switched_in_every_run(decorated: bool) -> None:
    code = ["with torch.no_grad(): y = self.head(x)", "with torch.autocast('cpu', enabled=False):"]
    code += ["    return self.blocks[0](y.float())"]
    model = net("return self.frozen(x)" if decorated else "\n".join(code))
    type(model).frozen = torch.no_grad()(lambda self, x: self.blocks[0](self.head(x)))  # type: ignore[attr-defined]
    converted, x = convert(model, "bkn", stat_batch=2).train(), torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = converted(x)
        assert y.dtype == model.train()(x).dtype
    assert y.requires_grad is not decorated
    if not decorated:
        y.sum().backward()
    assert converted.head.weight.grad is None  # type: ignore[union-attr]
    report = belief_report(converted)
    assert not any(report[name] for name in report if name != "bn")


def test_a_function_that_is_set_is_called() -> None:
    model = net("return self.scale(self.act(x))")
    model.act = torch.relu  # type: ignore[assignment]
    type(model).scale = lambda self, x: 2 * x  # type: ignore[attr-defined]
    converted, x = same(model), torch.randn(2, 3, 6, 6)
    assert not untraced(converted)
    for each in (model, converted):
        each.act = torch.tanh  # type: ignore[assignment]
        each.scale = MethodType(lambda self, x: 3 * x, each)
    torch.testing.assert_close(copy.deepcopy(converted)(x), model(x))


def triple(*args: Any) -> Any:
    return 3 * args[-1]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3x3(4, 4)

    def scale(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.conv(x))


class Operations:
    twice = staticmethod(lambda x: x * RATE * 2)


# Code of a forward, what of it is replaced afterwards (an owner, a name), by what.
REBOUND: dict[str, tuple[str, Callable[[Any], Any], str, Any]] = {
    "a function": ("return scaled(x)", lambda _: globals(), "scaled", triple),
    "what a function calls": ("return outer(x)", lambda _: globals(), "scaled", triple),
    "a library's": ("return activation(x)", lambda _: globals(), "activation", torch.tanh),
    "a function of a class": ("return Operations.twice(x)", lambda _: Operations, "twice", staticmethod(triple)),
    "a method": ("return self.scale(x)", type, "scale", triple),
    "a property": ("return x * self.rate", type, "rate", property(lambda self: 3.0)),
    "a method of a part": ("return self.part.scale(x)", lambda _: Part, "scale", triple),
    "a method of a part's instance": ("return self.part.scale(x)", lambda model: model.part, "scale", triple),
    "a part that has another": ("return self.part.scale(x)", lambda model: model, "part", nn.PReLU()),
    "the forward": ("return x", type, "forward", lambda self, x: 3 * self.bn(self.conv(x))),
    "a part's": ("return self.part(x)", lambda _: Part, "forward", lambda self, x: 3 * self.conv(x)),
    "a Sequential's": ("return self.row(x)", lambda model: type(model.row), "forward", triple),
    "a layer's": ("return self.own(x)", lambda model: type(model.own), "forward", triple),
}


def rebound(code: str) -> Net:
    model = net(code)
    type(model).scale, type(model).rate = lambda self, x: 2 * x, property(lambda self: 2.0)  # type: ignore[attr-defined]
    model.part, model.row = Part(), type("Row", (nn.Sequential,), {})(conv3x3(4, 4), nn.BatchNorm2d(4))
    model.own = type("Own", (nn.Conv2d,), {})(4, 4, 3)
    return model.eval()


@pytest.mark.parametrize("kind", REBOUND)
def test_a_function_that_was_replaced_is_called(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, owner, name, value = REBOUND[kind]
    converted, x = same(model := rebound(code)), torch.randn(2, 3, 6, 6)
    assert not untraced(converted)
    before = model(x)
    if kind == "a part that has another":
        value.scale = triple
    for each in (model, converted):
        of = owner(each)
        monkeypatch.setitem(of, name, value) if isinstance(of, dict) else monkeypatch.setattr(of, name, value)
    for each in (converted, copy.deepcopy(converted)):
        torch.testing.assert_close(each(x), model(x))
    assert model(x).shape != before.shape or not torch.equal(model(x), before)


@pytest.mark.slow
def test_functions_that_may_be_replaced_are_compiled() -> None:
    code = "x = Operations.twice(activation(outer(self.part.scale(self.scale(x) * self.rate))))\n"
    converted, x = same(rebound(f"{code}return self.own(self.row(self.part(x)))")), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), converted(x))


class Scaling(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * RATE


def test_what_is_called_by_super_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    class Outer(Scaling):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    converted, x = same(model := Outer(None).eval()), torch.randn(2, 3, 6, 6)
    monkeypatch.setitem(globals(), "RATE", 5.0)
    torch.testing.assert_close(converted(x), model(x))
    monkeypatch.setattr(Scaling, "forward", lambda self, x: Net.forward(self, x) * 7)
    torch.testing.assert_close(converted(x), model(x))


class Mode(IntEnum):
    PLAIN = 0
    NEGATIVE = 1


def test_values_whose_repr_is_no_code() -> None:
    model = net("return x if self.mode == Mode.PLAIN and 'b' in self.used else -x * float(self.rate)")
    model.mode, model.used, model.rate = Mode.PLAIN, {"b"}, numpy.float64(2.0)  # type: ignore[assignment]
    converted, x = same(model), torch.randn(2, 3, 6, 6)
    changes = (lambda m: m.used.clear(), lambda m: setattr(m, "mode", 1), lambda m: setattr(m, "rate", 3))
    for change in changes:
        for each in (model, converted):
            change(each)
        torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("kind", ["hook", "arguments", "metaclass"])
def test_registries_of_subclasses_are_told_of_none(kind: str) -> None:
    known = []

    class Once(type):
        def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **options: Any) -> None:
            assert name not in known
            known.append(name)

    class Registered(Net, metaclass=Once if kind == "metaclass" else type):
        def __init_subclass__(cls, **options: Any) -> None:
            assert kind != "hook" or cls.__name__ not in known
            assert kind != "arguments" or options
            known.append(cls.__name__) if kind == "hook" else None

    options = {"kind": 1} if kind == "arguments" else {}
    model = type(Registered)("Written", (Registered,), {}, **options)(None)
    number = len(known)
    same(model.eval())
    assert len(known) == number
