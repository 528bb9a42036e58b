"""What the tests of the core share: tolerances, the order of images in groups, small networks that can be pickled, a
step of training."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from kalmannorm import Belief, convert
from kalmannorm.models import ARCHS
from kalmannorm.norm import Estimator
from kalmannorm.norm.belief import pick
from kalmannorm.norm.moments import channel_belief
from kalmannorm.norm.sampling import Noise

D = torch.float64
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-12), (torch.float32, 1e-5)], ids=str)


def error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, the measure of all tolerances here. Zeros must be met exactly."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all()
    difference, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    return difference / size if size else float(difference > 0)


def interleaved(images: int, groups: int) -> Tensor:
    """Order that deals contiguous groups of images out in turn: group g becomes images g, g + groups, ..."""
    return torch.arange(images).view(groups, images // groups).T.flatten()


def random_belief(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Belief:
    return Belief(torch.randn(rows, channels, dtype=dtype), torch.rand(rows, channels, dtype=dtype) + 0.1)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Fresh copies that collect gradients."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def affine(layer: nn.Module, channels: int) -> None:
    """The same uneven gamma and beta for layers that are to be compared."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, channels))  # type: ignore[operator, union-attr]
        layer.bias.copy_(torch.linspace(-1, 1, channels))  # type: ignore[operator, union-attr]


def moving(layer: nn.Module) -> list[Tensor]:
    return [layer.running_mean, layer.running_var]  # type: ignore[list-item]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= tolerance


def estimated(layer: nn.Module, x: Tensor, prior: Belief | None = None) -> tuple[Tensor, Belief | None]:
    """What a normalizer returns where beliefs are given: y and its belief; None of one that takes none."""
    if not isinstance(layer, Estimator):
        return layer(x), None
    return layer(x, beliefs=() if prior is None else prior)


class Spy:
    """What the normalizers of a converted model got and handed on, and what was drawn, in the last forward."""

    def __init__(self, model: nn.Module) -> None:
        self.prior: dict[str, Belief | None] = {}
        self.handed_on: dict[str, Belief] = {}
        self.noise: dict[str, Tensor] = {}
        self.input: dict[str, Tensor] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, Estimator):
                nn.Module.register_forward_hook(layer, self.see(name), with_kwargs=True)  # which sees beliefs
            elif isinstance(layer, Noise):
                layer.register_forward_hook(lambda _, __, out, name=name: self.noise.update({name: out}))

    def see(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Any]) -> None:
            self.prior[name] = channel_belief(pick(kwargs["beliefs"], 0, "x"))
            handed_on = out[1]
            self.handed_on[name] = handed_on if isinstance(handed_on, Belief) else handed_on.belief
            self.input[name] = args[0].detach()

        return hook


def same_belief(found: Belief | None, expected: Belief) -> None:
    assert found is not None
    for a, b in zip(found, expected, strict=True):
        assert error(a.detach(), b.detach().expand_as(a)) < 1e-5


def conv3x3(c_in: int, c_out: int, stride: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, **{"bias": False, **options})  # type: ignore[arg-type]


Middle = Callable[["Chain", Tensor], Tensor]


class Chain(nn.Module):
    """conv1, bn1, whatever `middle` does, conv2, bn2: what happens to a belief between two normalizers."""

    def __init__(self, middle: Middle, c_middle: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv3x3(c_middle, 5, stride), nn.BatchNorm2d(5)
        self.side = conv3x3(4, 4)
        self.relu, self.relu_inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.identity, self.pool, self.prelu = nn.Identity(), nn.MaxPool2d(2), nn.PReLU()
        self.norm, self.depth = nn.GroupNorm(2, 4), StochasticDepth(0.1, "row")
        self.register_buffer("matrix", torch.eye(8).flip(0))
        self.middle = middle
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.middle(self, self.bn1(self.conv1(x)))))


class Residual(nn.Module):
    """Stem, one residual block with a shortcut convolution, classifier: x [N, 3, H, W] -> [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 8, bias=True), nn.BatchNorm2d(8, eps=1e-4, momentum=0.3)
        self.conv1, self.bn1 = conv3x3(8, 12, 2), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv3x3(12, 12, groups=2), nn.BatchNorm2d(12)
        # Not of fewer than 8 channels: in channels_last, which Inductor chooses too, torch 2.15's gradient of a strided
        # 1x1 convolution of fewer writes past its memory on processors without AVX-512.
        self.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, 4)
        for bn in (self.bn, self.bn1, self.bn2, self.shortcut[1]):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.relu(out), 1), 1))


class Moody(nn.Module):
    """Differs between training and evaluation: functional dropout, and an auxiliary head in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 8), nn.BatchNorm2d(8)
        self.aux_conv, self.aux_bn = conv3x3(8, 4), nn.BatchNorm2d(4)
        self.fc, self.aux_fc = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.dropout(F.relu(self.bn(self.conv(x))), 0.4, training=self.training)
        out = self.fc(x.mean((2, 3)))
        if self.training:
            return out, self.aux_fc(self.aux_bn(self.aux_conv(x)).mean((2, 3)))
        return out


class Perceptron(nn.Module):
    """Fully connected, with BatchNorm1d: x [N, 3] -> [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(3, 6), nn.BatchNorm1d(6)
        self.fc2, self.bn2 = nn.Linear(6, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.fc2(F.relu(self.bn1(self.fc1(x)))))


class Modern(nn.Module):
    """What newer networks are made of: gates, smooth activations, shuffles, scales, random depth; -> [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 8), nn.BatchNorm2d(8)
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.depthwise, self.bn1 = conv3x3(8, 8, groups=8), nn.BatchNorm2d(8)
        self.point, self.bn2 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.scale, self.prelu = nn.Parameter(torch.full((8, 1, 1), 0.5)), nn.PReLU(8)
        self.depth, self.shuffle = StochasticDepth(0.2, "row"), nn.ChannelShuffle(2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.conv(x)), inplace=True)
        x = x * F.hardsigmoid(self.up(F.gelu(self.down(self.pool(x)))))
        a, b = F.hardswish(self.bn1(self.depthwise(x))).chunk(2, 1)
        x = x + self.depth(self.scale * self.bn2(self.point(a * torch.sigmoid(b))))
        n, c, h, w = x.shape
        x = self.prelu(self.shuffle(x)).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))


def same_as_original(model: nn.Module, x: Tensor, norm: str = "bn", **options: Any) -> nn.Module:
    """In both modes, moving statistics included."""
    converted = convert(model, norm, **options)
    for training in (True, False):
        outputs = []
        for network in (model.train(training), converted.train(training)):
            torch.manual_seed(1)
            random.seed(1)
            outputs.append(network(x))
        assert equal(*outputs)
    return converted


def loss_of(out: Any) -> Tensor:
    return sum(o.square().mean() for o in out) if isinstance(out, tuple) else out.square().mean()  # type: ignore[return-value]


def train_step(model: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    """A forward, a backward and a step of a size that no network explodes at; the loss."""
    torch.manual_seed(seed)  # dropout
    loss = loss_of(model(x))
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad.sign()
    return loss.detach()


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    """With moving statistics and affine parameters that are not those of the start."""
    model.train()
    for i in range(steps):
        train_step(model, images(), i)
    return model


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


TABLE_2 = ("densenet121", "densenet169", "resnext101_32x4d", "se_resnet101")  # the talk's, large: test_placement.py
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: build for name, build in ARCHS.items() if name not in TABLE_2 and not name.startswith("i3d")},
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "moody": Moody,
    "modern": Modern,
}
SAMPLING = {"predictor": "sampling", "stat_batch": 2}
FEW = ("inception_cifar", "resnet14", "resnet14_preact", "resnet18", "moody", "modern")


def quick(values: Iterable[Any], *always: Any) -> list[Any]:
    """Values of a test's parameter: `always` these, the others in `make test-all` alone."""
    return [value if value in always else pytest.param(value, marks=pytest.mark.slow) for value in values]


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


TALK = Path(__file__).parent / "golden" / "talk"


def talk_golden(name: str) -> dict[str, Tensor]:
    with np.load(TALK / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}
