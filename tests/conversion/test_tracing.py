"""What convert does with arguments and outputs of all kinds, and with what a traced forward reads."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import conv3x3, equal, error, images, same_as_original
from torch import Tensor, nn

from kalmannorm import belief_report, convert, fold
from kalmannorm.conversion import untraced


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Optional(nn.Module):
    """Options of forward that decide what it computes; outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4), nn.BatchNorm2d(4)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, features: bool = False, *, power: float = 2.0
    ) -> "OrderedDict[str, Tensor]":
        y = self.bn(input=self.conv(input=x)) ** power
        if mask is not None:
            y = y * mask
        return OrderedDict(out=y, second=x) if not features else OrderedDict(features=y)


def test_options_of_forward() -> None:
    model = Optional()
    converted = same_as_original(model, x := images())
    kalman = convert(model, "bkn", gain=1.0, learn_gain=False, noise=False)
    for arguments in ({}, {"power": 3.0}, {"mask": x[:, :1]}, {"features": True}):
        assert equal(converted(x, **arguments), model(x, **arguments))
        found, expected = kalman(x, **arguments), model(x, **arguments)
        assert type(found) is OrderedDict and list(found) == list(expected)
        assert all(error(found[key].detach(), expected[key].detach()) < 1e-5 for key in found)
    assert equal(converted(x, None, False), model(x))
    assert belief_report(convert(model, "bkn", input_belief=([0.0] * 3, [1.0] * 3)), x)["bn"] is None


class OnTheSpot(nn.Module):
    """Modules that are made where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = nn.ReLU()(self.bn(self.conv(x)))
        return x, [nn.MaxPool2d(2)(x), x]


def test_modules_made_on_the_spot() -> None:
    same_as_original(OnTheSpot(), images())


class Buffered(nn.Module):
    """What is computed of buffers is computed in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.register_buffer("level", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * (self.level.view(1, -1, 1, 1) * 2)


class Settings(nn.Module):
    """Reads what its class says, and a dict."""

    doubles = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.more = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) * self.more["scale"]
        return 2 * x if self.doubles else x


def test_settings_of_classes_and_dicts_are_not_frozen() -> None:
    model, x = convert(Settings(), "bkn", stat_batch=2).eval(), torch.randn(4, 3, 8, 8)
    once = model(x)
    model.doubles = True  # type: ignore[assignment]
    torch.testing.assert_close(model(x), 2 * once)
    model.more["scale"] = 3.0  # type: ignore[index, operator]
    torch.testing.assert_close(model(x), 6 * once)


class Numbered(nn.Module):
    """Counts by a buffer and by one of its part's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.conv.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.conv.calls = self.conv.calls + 2
        return self.bn(self.conv(x)) * self.calls * self.conv.calls


def test_buffers_that_a_forward_sets_stay_tensors() -> None:
    """What tracing put in their place is taken back."""
    model, x = convert(Numbered(), "bkn", stat_batch=2).eval(), torch.randn(4, 3, 8, 8)
    assert model.calls == 0 == model.conv.calls  # type: ignore[union-attr]
    once = model(x)
    torch.testing.assert_close(model(x), 4 * once)
    assert model.calls == 2 and model.conv.calls == 4  # type: ignore[union-attr]


def test_batch_norm_is_found_by_its_class() -> None:
    """By code that freezes layers, and by a forward that asks."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = 2 * part(x) if isinstance(part, nn.BatchNorm2d) else part(x)
            return x

    model, x = convert(Net(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = model.parts[1].running_mean.clone()  # type: ignore[union-attr, index, operator]
    y = model(x)
    assert torch.equal(model.parts[1].running_mean, before)  # type: ignore[index, union-attr, arg-type]
    torch.testing.assert_close(y, fold(model)(x))


def test_buffers_are_not_frozen() -> None:
    model = Buffered()
    converted = convert(model, "bn")
    for network in (model, converted):
        network.level.fill_(3)
    assert equal(converted(x := images()), model(x))
    converted.double()
    assert equal(converted(x.double()), model.double()(x.double()))


class Collecting(nn.Module):
    """Appends what it computes to a list that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
        x = self.bn(self.conv(x))
        found.append(x)
        return x


class Collected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.part = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Collecting()
        self.last, self.last_bn = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.bn(self.conv(x))]
        self.part(found[0], found)
        return self.last_bn(self.last(torch.cat(found, 1)))


def test_a_list_that_a_part_appends_to() -> None:
    model, x = convert(Collected(), "bkn", stat_batch=2), images()
    assert [name for name, why in belief_report(model, x).items() if why is None] == ["part.bn", "last_bn"]
    torch.testing.assert_close(fold(model.eval())(x), model(x))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.bn(self.conv(torch.cat(xs, 1)))


class Tree(nn.Module):
    """Puts a list that it was given behind one of its own, as DLA's does."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Root()

    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        return self.root([x] + more)


class Trees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.tree = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Tree()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.tree(x.relu(), [x])


def test_lists_are_put_together() -> None:
    model, x = convert(Trees(), "bkn", stat_batch=2), images()
    assert belief_report(model, x)["tree.root.bn"] is None and not untraced(model)
    torch.testing.assert_close(fold(model.eval())(x), model(x))


class Join(nn.Module):
    """Its forward is set by the test: what it takes of a and b is what `[a, b]` is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.join([a, b])

    def join(self, both: list[Tensor]) -> Tensor:
        return self.bn(self.conv(torch.cat(both, 1)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
        self.part = Join()
        for branch, shift in zip(self.stem, (3.0, -3.0), strict=True):
            nn.init.constant_(branch[1].bias, shift)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        a, b = (branch(x) for branch in self.stem)
        return self.hand_on(a, b)

    def hand_on(self, a: Tensor, b: Tensor) -> Tensor:
        return self.part(a, b)  # type: ignore[no-any-return]


# How the part takes what it is given, and how it is called.
ARGUMENTS: dict[str, tuple[Any, Any]] = {
    "after an option": (lambda s, a, how=None, b=None, c=None: s.join([a, c]), lambda s, a, b: s.part(a, None, a, b)),
    "after an option, by name": (lambda s, how=None, a=None, b=None: s.join([a, b]), lambda s, a, b: s.part(b=b, a=a)),
    "all there are": (lambda s, *given: s.join(given), lambda s, a, b: s.part(a, b)),
    "of all there are": (lambda s, *given: s.join([given[1], given[0]]), lambda s, a, b: s.part(b, a)),
    "by any name": (lambda s, a, **more: s.join([a, more["b"]]), lambda s, a, b: s.part(a, b=b)),
    "by name alone": (lambda s, a, *more, b: s.join([a, b]), lambda s, a, b: s.part(a, a, a, b=b)),
}


@pytest.mark.parametrize("how", ARGUMENTS)
def test_beliefs_go_with_their_arguments(how: str) -> None:
    x, model = images(), Branches()
    wanted = convert(model, "bkn", stat_batch=2)(x)
    takes, hands = ARGUMENTS[how]
    model.part.__class__ = type("Joining", (Join,), {"forward": takes})
    model.__class__ = type("Handing", (Branches,), {"hand_on": hands})
    converted = convert(model, "bkn", stat_batch=2)
    assert belief_report(converted, x)["part.bn"] is None
    torch.testing.assert_close(converted(x), wanted)
