"""What a forward names beside its arguments is what it is when the forward runs: globals, classes of layers, parts."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import conv3x3
from torch import Tensor, nn

from kalmannorm import belief_report, convert, fold
from kalmannorm.conversion import untraced

RATE, SETTINGS, LOG, CALLS = 1.0, {"rate": 1.0, "act": nn.ReLU}, list[int](), 0


class Config:
    rate = 1.0


CONFIG = Config()


def scaled(x: Tensor) -> Tensor:
    return x * RATE


def by_default(x: Tensor, rates: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return x * rates[0]


def is_convolution(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d


class Net(nn.Module):
    """conv, bn; what `then(self, x)` makes of it."""

    def __init__(self, then: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.then = conv3x3(3, 4), nn.BatchNorm2d(4), then
        self.blocks = nn.ModuleList(nn.Sequential(conv3x3(4, 4), nn.BatchNorm2d(4)) for _ in range(2))
        self.named = nn.ModuleDict({"a": conv3x3(4, 4)})
        self.head, self.state = nn.Conv2d(4, 4, 1), {"n": 0}
        self.settings, self.nested = SimpleNamespace(rate=1.0), {"a": {"rate": 1.0}, "act": nn.ReLU}
        self.register_module("more", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return then(self, x) if (then := self.__dict__["then"]) else x


def net(code: str) -> Net:
    """A network whose forward is written out: its class is of this module."""
    scope: dict[str, Any] = {}
    lines = ["def forward(self, x):", "    x = self.bn(self.conv(x))", *(f"    {line}" for line in code.splitlines())]
    exec(compile("\n".join(lines), "<test>", "exec"), globals(), scope)
    return type("Written", (Net,), {"forward": scope["forward"]})(None).eval()  # type: ignore[no-any-return]


def same(model: Net, norm: str = "bkn") -> nn.Module:
    x, converted = torch.randn(2, 3, 6, 6), convert(model, norm, stat_batch=2)
    torch.testing.assert_close(converted(x), model(x))
    return converted


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
    converted, x = same(model := net(code)), torch.randn(2, 3, 6, 6)
    assert not untraced(converted)
    before = model(x)
    for each in (model, converted):
        change(each)
    torch.testing.assert_close(converted(x), model(x))
    assert not torch.equal(model(x), before)


def test_what_a_function_closes_over_is_read_when_it_runs() -> None:
    box = {"rate": 1.0}

    class Closing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * box["rate"]

    converted, x = same(model := Closing(lambda *_: None).eval()), torch.randn(2, 3, 6, 6)
    box["rate"] = 5.0
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


# --- parts ---


def block() -> nn.Module:
    torch.manual_seed(1)
    return conv3x3(4, 4)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("return self.head(x) if self.head is not None else x", lambda model: setattr(model, "head", None)),
        ("return self.more(x) if self.more is not None else x", lambda model: setattr(model, "more", block())),
        ("return self.head(x) if hasattr(self, 'head') else x", lambda model: delattr(model, "head")),
        ("for b in self.blocks: x = b(x)\nreturn x", lambda model: model.blocks.append(block())),
        ("for b in self.blocks: x = b(x)\nreturn x", lambda model: setattr(model, "blocks", model.blocks[:1])),
        ("return x * len(self.blocks)", lambda model: model.blocks.append(block())),
        ("for b in self.named.values(): x = b(x)\nreturn x", lambda model: model.named.update({"b": block()})),
        ("for b in self.named.values(): x = b(x)\nreturn x", lambda model: model.named.pop("a")),
    ],
)
def test_parts_that_are_added_and_taken_away(code: str, change: Callable[[nn.Module], object]) -> None:
    converted, x = same(model := net(code)), torch.randn(2, 3, 6, 6)
    assert not untraced(converted)
    before = model(x)
    for each in (model, converted):
        change(each)
    torch.testing.assert_close(converted(x), model(x))
    assert not torch.equal(model(x), before)


# --- forwards on the instance, and what they return ---


@dataclass
class Output:
    value: Tensor
    second: Tensor | None = None


class InAnObject(nn.Module):
    def __init__(self, values_decide: bool) -> None:
        super().__init__()
        self.values_decide, self.part = values_decide, nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Output:
        return Output(self.part(x) if not self.values_decide or x.sum() < 1e9 else x)


class Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.conv, self.bn = part, conv3x3(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return self.bn(self.conv(x.value if isinstance(x, Output) else x))


def twice(self: Any, x: Tensor) -> Tensor:
    return 2 * (nn.Sequential if isinstance(self, nn.Sequential) else type(self)).forward(self, x)


def twice_the_whole(self: Any, x: Tensor) -> Tensor:
    return 2 * self.bn(self.conv(self.part(x)))


@pytest.mark.parametrize("values_decide", [False, True])
def test_a_data_class_hands_beliefs_on(values_decide: bool) -> None:
    model = Around(InAnObject(values_decide)).eval()
    converted, x = convert(model, "bkn", stat_batch=2), torch.randn(4, 3, 6, 6)
    assert belief_report(converted, x)["bn"] is None
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("place", ["", "part"])
def test_a_forward_on_the_instance_runs_as_it_is(place: str) -> None:
    model, x = Around(nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4))).eval(), torch.randn(4, 3, 6, 6)
    changed = model.get_submodule(place)
    changed.forward = MethodType(twice_the_whole if place == "" else twice, changed)
    converted = convert(model, "bkn", stat_batch=2)
    assert "set on the instance" in untraced(converted)[place] and belief_report(converted, x)["bn"] is None
    for copied in (converted, copy.deepcopy(converted), fold(converted)):
        torch.testing.assert_close(copied(x), model(x))
    folded = fold(converted).get_submodule(place)
    assert isinstance(folded.forward, MethodType) and folded.forward.__self__ is folded


def test_a_layer_with_a_forward_on_the_instance_has_no_rule() -> None:
    model = Around(nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(6, 6)))
    for layer in model.part[2:]:  # type: ignore[index]
        layer.forward = MethodType(twice, layer)
    report = belief_report(converted := convert(model.eval(), "bkn", stat_batch=2), x := torch.randn(4, 3, 6, 6))
    assert str(report["bn"]).startswith("part.2 (ReLU: a hook or a forward of its own")
    torch.testing.assert_close(converted.eval()(x), model(x))


@pytest.mark.parametrize("place", ["block", "conv"])
def test_a_forward_set_on_a_part_after_the_conversion(place: str) -> None:
    """It runs as it is, and hands no belief on."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.block(self.stem(x))))

    model, x = convert(Parts(), "bkn", stat_batch=2), torch.randn(4, 3, 12, 12)
    assert belief_report(model, x)["bn"] is None
    part = model.get_submodule(place)
    part.forward = MethodType(lambda self, x: x * 2, part)
    assert "before it" in str(belief_report(model, x)["bn"])
    before = model.block(model.stem(x)) if place == "conv" else model.stem(x)
    after = (lambda y: y) if place == "conv" else model.conv
    torch.testing.assert_close(model(x), model.bn(after(2 * before)))
