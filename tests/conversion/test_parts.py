"""Parts of a model that change after the conversion, lists of parameters, and forwards that stand on an instance."""

import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from helpers import conv3x3
from torch import Tensor, nn

from kalmannorm import belief_report, convert, fold
from kalmannorm.conversion import untraced


class Used(nn.Module):
    """What a ReLU takes in is used again behind it."""

    def __init__(self, nested: bool, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.bn1, self.conv2, self.bn2 = conv3x3(3, 4), nn.BatchNorm2d(4), conv3x3(4, 4), nn.BatchNorm2d(4)
        self.relu: nn.Module = nn.ReLU(inplace)
        if nested:
            self.relu = nn.Sequential(nn.Sequential(self.relu))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        z = self.relu(y)
        return self.bn2(self.conv2(y)) + z


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_relu_that_is_in_place_from_now_on_or_no_longer(before: bool, nested: bool) -> None:
    changed, x = convert(Used(nested, before), "bkn", stat_batch=2), torch.randn(2, 3, 6, 6)
    next(layer for layer in changed.modules() if isinstance(layer, nn.ReLU)).inplace = not before
    torch.testing.assert_close(changed(x), convert(Used(nested, not before), "bkn", stat_batch=2)(x))


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Sequential(conv3x3(3, 3), nn.BatchNorm2d(3)) for name in ("a", "b")})
        self.scales = nn.ParameterList([torch.ones(()), torch.full((), 2.0)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(()), "b": torch.ones(())})

    def forward(self, x: Tensor) -> Tensor:
        for (name, layer), scale in zip(self.layers.items(), self.scales, strict=True):
            x = layer(x) * scale + self.shifts[name]
        return x


def test_lists_and_dicts_of_parameters_in_a_loop() -> None:
    model, x = Scales().eval(), torch.randn(2, 3, 6, 6)
    converted = convert(model, "bkn", stat_batch=2)
    torch.testing.assert_close(converted(x), model(x))
    assert belief_report(converted, x)["layers.b.1"] is None and not untraced(converted)


# --- forwards on the instance, and what they return ---


@dataclass
class Output:
    value: Tensor
    second: Tensor | None = None


@dataclass(slots=True)
class SlottedOutput:
    value: Tensor


class NamedOutput(NamedTuple):
    value: Tensor
    second: Tensor | None = None


class InAnObject(nn.Module):
    def __init__(self, values_decide: bool, kind: Any = Output) -> None:
        super().__init__()
        self.values_decide, self.part = values_decide, nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(value=self.part(x) if not self.values_decide or x.sum() < 1e9 else x)


class Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.conv, self.bn = part, conv3x3(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return self.bn(self.conv(x if isinstance(x, Tensor) else x.value))


def twice(self: Any, x: Tensor) -> Tensor:
    return 2 * (nn.Sequential if isinstance(self, nn.Sequential) else type(self)).forward(self, x)


def twice_the_whole(self: Any, x: Tensor) -> Tensor:
    return 2 * self.bn(self.conv(self.part(x)))


@pytest.mark.parametrize("kind", [Output, SlottedOutput, NamedOutput])
@pytest.mark.parametrize("values_decide", [False, True])
def test_an_object_hands_the_beliefs_of_its_fields_on(values_decide: bool, kind: Any) -> None:
    model = Around(InAnObject(values_decide, kind)).eval()
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


def doubling(cls: Any, method: str = "__call__") -> Any:
    """A class whose call does more than its forward."""

    def call(self: Any, x: Tensor) -> Tensor:
        return 2 * getattr(cls, method)(self, x)  # type: ignore[no-any-return]

    return type(f"Doubling{cls.__name__}", (cls,), {method: call})


@pytest.mark.parametrize("method", ["__call__", "_call_impl"])
@pytest.mark.parametrize("values_decide", [False, True])
@pytest.mark.parametrize("place", ["block", "conv", "relu", "whole"])
def test_a_call_of_a_parts_own_runs_as_it_is(place: str, values_decide: bool, method: str) -> None:
    """It runs once, also where the forward around it is traced, and hands no belief on."""

    class Block(nn.Sequential):
        pass

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.block = (doubling(Block, method) if place == "block" else Block)(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.relu = (doubling(nn.ReLU, method) if place == "relu" else nn.ReLU)()
            self.conv = (doubling(nn.Conv2d, method) if place == "conv" else nn.Conv2d)(4, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            if values_decide and x.max() > 100:
                x = x / 100
            return self.bn(self.conv(self.relu(self.block(self.stem(x)))))

    model, x = (doubling(Parts, method) if place == "whole" else Parts)().eval(), torch.randn(4, 3, 12, 12)
    converted = convert(model, "bkn", stat_batch=2)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(fold(converted)(x), model(x))
    assert bool(untraced(converted)) is values_decide


def test_the_report_names_a_call_of_a_parts_own() -> None:
    part = nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4), doubling(nn.Sequential)(conv3x3(4, 4)))
    report = belief_report(convert(Around(part), "bkn", stat_batch=2), torch.randn(4, 3, 6, 6))
    assert "part.2 (DoublingSequential: a hook or a forward of its own, or a __call__" in str(report["bn"])


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


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_the_report_says_what_was_put_in_a_normalizers_place(norm: str) -> None:
    """As code does that looks for BatchNorm layers, to freeze them and to thaw them as such."""
    model, x = convert(Used(False, False), norm, stat_batch=2), torch.randn(4, 3, 6, 6)
    assert all(why is None or "nothing" in why for why in belief_report(model, x).values())
    model.bn2 = nn.BatchNorm2d(4)
    assert belief_report(model, x)["bn2"] == "no normalizer of convert's: a BatchNorm2d was put in its place"
    assert belief_report(convert(model, norm, stat_batch=2), x).get("bn2") is None
    model.bn1 = nn.Identity()
    assert list(belief_report(model, x)) == ["bn1", "bn2"]
