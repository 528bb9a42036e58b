"""What a forward decides by arguments, by parts, and by what is missing is decided when it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import conv3x3
from torch import Tensor, nn
from written import Net, changes_alike, same, written


def net(code: str) -> Net:
    return written(code, globals())


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return -grad[0]


# Code of a forward that decides by what is not a value, and what changes that.
DECIDED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a missing argument": ("return self.optional(x) + self.optional(x, x)", lambda _: None),
    "an argument that is None": ("return self.required(x, None) + self.required(x, x)", lambda _: None),
    "the mode of a part": ("return x if self.head.training else -x", lambda model: model.head.train()),
    "an attribute of the input": ("return self.with_tensors(x)", lambda _: None),
    "one with a default": ("return self.with_mask(x)", lambda _: None),
    "a parameter": ("return x if self.head.bias is None else -x", lambda model: setattr(model.head, "bias", None)),
    "parameters in a loop": (
        "return x + sum(p.square().sum() for p in self.head.parameters())",
        lambda model: model.head.weight.data.mul_(3),
    ),
    "what there is by name": ("return self.by_name(x) + self.by_name(x, rate=3)", lambda _: None),
    "a name of generated code": ("return self.named_so(x, x)", lambda _: None),
    "a gradient of its own": ("return Flipped.apply(x)", lambda _: None),
}


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(4, 4), conv3x3(4, 4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.conv1(x) if skip is None else self.conv2(x) + skip


class Required(Optional):
    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:  # type: ignore[override]
        return super().forward(x, skip)


class WithTensors(Optional):
    def forward(self, x: Any) -> Tensor:  # type: ignore[override]
        return self.conv1(x.tensors if hasattr(x, "tensors") else x)  # type: ignore[no-any-return]


class WithMask(Optional):
    def forward(self, x: Any) -> Tensor:  # type: ignore[override]
        return self.conv1(x) if getattr(x, "mask", None) is None else x.mask


class ByName(Optional):
    def forward(self, x: Tensor, **more: Any) -> Tensor:  # type: ignore[override]
        return self.conv1(x) * more.get("rate", 2)  # type: ignore[no-any-return]


class Named(Optional):
    def forward(self, call: Tensor, pick: Tensor) -> Tensor:  # type: ignore[override]
        return self.conv1(call) + pick  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", DECIDED)
def test_what_a_forward_decides_is_decided_when_it_runs(kind: str) -> None:
    code, change = DECIDED[kind]
    model, x = net(code), torch.randn(2, 3, 6, 6)
    model.optional, model.required, model.named_so = Optional(), Required(), Named()
    model.with_tensors, model.with_mask, model.by_name = WithTensors(), WithMask(), ByName()
    converted = same(model)
    for _ in range(2):
        for each in (model, converted):
            each.zero_grad()
            each(x).square().sum().backward()
        torch.testing.assert_close(converted(x), model(x))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(converted.get_parameter(name).grad, parameter.grad)
        for each in (model, converted):
            change(each)


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
    changes_alike(net(code), change)
