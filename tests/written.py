"""A small network whose forward is written out by the test."""

import os  # noqa: F401
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from helpers import conv3x3
from torch import Tensor, nn

from kalmannorm import convert
from kalmannorm.conversion import untraced


class Net(nn.Module):
    """conv, bn; what `then(self, x)` makes of it."""

    calls = 0

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


def written(code: str, scope: dict[str, Any]) -> Net:
    """Return a network with a forward of this code, whose globals are `scope`: those of the test's module."""
    made: dict[str, Any] = {}
    lines = ["def forward(self, x):", "    x = self.bn(self.conv(x))", *(f"    {line}" for line in code.splitlines())]
    exec(compile("\n".join(lines), "<test>", "exec"), scope, made)
    body = {"forward": made["forward"], "__module__": scope["__name__"]}
    return type("Written", (Net,), body)(None).eval()  # type: ignore[no-any-return]


def same(model: Net, norm: str = "bkn") -> nn.Module:
    """Return the converted model, after a comparison with the model in evaluation."""
    x, converted = torch.randn(2, 3, 6, 6), convert(model, norm, stat_batch=2)
    torch.testing.assert_close(converted(x), model(x))
    return converted


def changes_alike(model: Net, change: Callable[[nn.Module], object]) -> None:
    """Assert that a change has the same effect on the model and on the converted one, which is traced."""
    converted, x = same(model), torch.randn(2, 3, 6, 6)
    assert not untraced(converted)
    before = model(x)
    for each in (model, converted):
        change(each)
    torch.testing.assert_close(converted(x), model(x))
    assert not torch.equal(model(x), before)
