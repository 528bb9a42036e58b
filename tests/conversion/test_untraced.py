"""Forwards that torch.fx cannot trace, or would trace wrongly: they run as they are, beliefs followed by tensor."""

import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Chain, Residual, conv3x3, equal, images, same_as_original
from torch import Tensor, nn

from kalmannorm import belief_report, convert, fold
from kalmannorm.conversion import untraced


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x


class Lottery(nn.Module):
    """Random numbers that fx would freeze, of two generators."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (self.scale if torch.rand(()) < 0.5 and random.random() < 0.7 else 3 * self.scale)


class Counting(nn.Module):
    """A state that fx would freeze, which nothing shows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Holding(nn.Module):
    """conv1, bn1, ReLU; `part` on a value that has a parameter of its own before it; conv2, bn2."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.outer = nn.Sequential(nn.ReLU(), part)
        self.conv2, self.bn2 = conv3x3(4, 5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.outer(self.bn1(self.conv1(x)))))


@pytest.mark.parametrize("part", [Branching, Lottery])
def test_untraceable_parts_run_as_they_are(part: type[nn.Module]) -> None:
    model = Holding(part())
    state = torch.get_rng_state(), random.getstate()
    converted = convert(model, "bkn")
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert belief_report(converted, images())["bn2"] == f"outer.1 ({part.__name__})"
    converted = same_as_original(model, images())
    assert equal(fold(converted).eval()(x := images()), model.eval()(x))


def test_scripted_parts_are_left_as_they_are() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.norm = scripted, nn.BatchNorm2d(8)
            self.conv, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(self.norm(self.part(x))))

    model, x = convert(Net(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    assert belief_report(model, x)["last"] is None
    torch.testing.assert_close(fold(model.eval())(x), model(x))


def test_leaves() -> None:
    """Code whose tracing goes wrong unnoticed is marked by hand."""
    model = Holding(Counting())
    converted = convert(model, "bn", leaves=[Counting])
    x = images()
    with torch.no_grad():
        for network in (model.eval(), converted.eval()):
            network.outer[1].calls = 0
        assert [equal(converted(x), model(x)) for _ in range(3)] == [True] * 3
    assert "Counting" in str(belief_report(convert(model, "bkn", leaves=(Counting,)), x)["bn2"])
    with pytest.raises(ValueError, match=r"outer \(Sequential\) cannot be a leaf: it holds the normalizer outer\.1"):
        convert(Holding(nn.BatchNorm2d(4)), "bkn", leaves=(nn.Sequential,))


class Restless(nn.Module):
    """Random numbers beside a normalizer: no part of it can be left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if not self.training or torch.rand(1) < 0.5 else -x


def test_random_numbers_are_not_frozen() -> None:
    """The forward runs as it is: tracing it would draw once for all."""
    converted = convert(Restless(), "bkn", stat_batch=2)
    assert "draws random numbers" in untraced(converted)[""]
    assert len({bool(converted(x := images())[0, 0, 0, 0] == converted(x)[0, 0, 0, 0]) for _ in range(30)}) == 2


class Unfriendly(nn.Module):
    """Values decide what it computes, of parts that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Residual()
        self.body = nn.ModuleDict({"block": Holding(nn.Identity()), "rest": Restless()})

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.stem(x)
        return self.body["block"](x)


def test_parts_of_what_cannot_be_traced_are() -> None:
    model = Unfriendly()
    converted = convert(model, "bkn", stat_batch=2)
    assert list(untraced(converted)) == ["", "body.rest"]
    for x in (images() + 9, images() - 9):
        assert sum(why is None for why in belief_report(converted, x).values()) >= 1
        assert equal(convert(model, "bn")(x), model(x))


def test_parts_whose_forward_is_called_by_name_hand_beliefs_on() -> None:
    """Containers of which one is traced, a Sequential, a layer."""

    def by_name(self: Any, x: Tensor) -> Tensor:
        for part in (self.traced, self.row, self.layer, self.untraced):
            x = part.forward(x) if x.sum() < 1e9 else x
        return x

    model = Chain(by_name)
    model.traced, model.untraced = Chain(lambda self, x: self.pool(x)), Chain(lambda self, x: x if x.sum() < 9 else -x)
    model.traced.conv1, model.untraced.conv1 = conv3x3(4, 4), conv3x3(4, 4)
    model.row, model.layer = nn.Sequential(conv3x3(5, 4), nn.BatchNorm2d(4)), conv3x3(4, 4)
    model.conv2 = conv3x3(5, 5)
    report = belief_report(convert(model, "bkn", stat_batch=2), images(size=16))
    assert [name for name, why in report.items() if why is not None] == ["bn1"] and len(report) == 7


class Attending(nn.Module):
    """Cannot be traced, and loses the belief two operations before a normalizer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.bn1(x), 1)
        return self.bn2(x.transpose(2, 3).contiguous() if x.mean() > 0 else x)


def test_a_belief_passes_a_subsampling_where_nothing_is_traced() -> None:
    model = convert(Chain(lambda self, x: x[:, :, ::2, ::2] if x.sum() < 1e9 else x), "bkn", stat_batch=2)
    assert "" in untraced(model) and belief_report(model, images())["bn2"] is None


def test_what_lost_a_belief_where_nothing_is_traced() -> None:
    assert belief_report(convert(Attending(), "bkn"), images())["bn2"] == "softmax (softmax)"


@torch.fx.wrap
def doubled_where_positive(x: Tensor) -> Tensor:
    return 2 * x if x.sum() > 0 else x


def test_a_function_that_is_marked_as_a_leaf_runs_as_it_is() -> None:
    model = Chain(lambda self, x: doubled_where_positive(x))
    assert belief_report(convert(model, "bkn"), images())["bn2"] == "doubled_where_positive (doubled_where_positive)"
    same_as_original(model, images())
    same_as_original(model, -images())


class Waiting(nn.Module):
    """Is not traced, and waits in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, wait: Any) -> Tensor:
        x = self.bn1(self.conv1(x))
        wait()
        return self.bn2(self.conv2(x)) if x.isfinite().all() else x


def test_forwards_of_two_threads() -> None:
    """As of DataParallel's replicas: one ends while the other waits."""
    model, x = convert(Waiting(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model)(x, int)
    first_is_in, second_is_in, first_is_done = (threading.Event() for _ in range(3))

    def second() -> Tensor:
        first_is_in.wait()
        return copy.deepcopy(model)(x, lambda: (second_is_in.set(), first_is_done.wait(60)))

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(second)
        first = copy.deepcopy(model)(x, lambda: (first_is_in.set(), second_is_in.wait(60)))
        first_is_done.set()
        assert torch.equal(first, expected) and torch.equal(found.result(), expected)


class OfItself(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], values_decide: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.conv2, self.bn2 = conv3x3(3, 4), nn.BatchNorm2d(4), conv3x3(4, 4), nn.BatchNorm2d(4)
        self.function, self.values_decide = function, values_decide

    def forward(self, x: Tensor) -> Tensor:
        if self.values_decide and x.sum() > 1e9:
            x = x / 2
        return self.bn2(self.conv2(self.function(self.bn1(self.conv1(x)))))


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (lambda x: x * torch.sigmoid(x), True),
        (lambda x: x * (F.relu6(x + 3) / 6), True),
        (lambda x: F.softplus(x).tanh().mul(x), True),
        (lambda x: torch.mul(input=x, other=torch.sigmoid(input=x)), True),
        (lambda x: 2 - torch.negative(x).divide(2).multiply(3), True),
        (lambda x: torch.true_divide(1 - x, 2).subtract(1), True),
        (lambda x: x * (F.relu6(3 + x) / 6), True),
        (lambda x: x + x * 2, False),
        (lambda x: x + 2 * x, False),
        (lambda x: x * (1 - torch.sigmoid(x)), False),
        (lambda x: x - F.relu(x).add(1), False),
    ],
)
def test_functions_of_one_value_are_known_where_nothing_is_traced(function: Any, known: bool) -> None:
    x = torch.randn(4, 3, 8, 8)
    traced, followed = (convert(OfItself(function, decide), "bkn", stat_batch=2) for decide in (False, True))
    assert "" in untraced(followed) and not untraced(traced)
    reports = belief_report(traced, x)["bn2"], belief_report(followed, x)["bn2"]
    assert {why is None for why in reports} == {known}
    torch.testing.assert_close(followed(x), traced(x))


class WeightByName(OfItself):
    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.bn1(self.conv1(x)), weight=self.conv2.weight, padding=1)
        return self.bn2(x / 2 if x.sum() > 1e9 else x)


def test_a_weight_that_is_passed_by_name_where_nothing_is_traced() -> None:
    model, x = convert(WeightByName(torch.relu, True), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)
    assert untraced(model) and belief_report(model, x)["bn2"] is None
