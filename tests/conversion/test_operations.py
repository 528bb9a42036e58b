"""Operations that carry a belief, against what a large sample of the belief shows after the operation itself ran."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import Spy, error, same_belief
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from kalmannorm import Belief, belief_report, convert, initialize_weight_norm
from kalmannorm.norm import activations
from kalmannorm.norm import moments as rules

C = 8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


Between = Callable[["Independent", Tensor], Tensor]


class Independent(nn.Module):
    """Whatever `between` does to a map of independent pixels and channels, N(beta, gamma^2); bn2.

    The convolution before bn2 mixes neither, since operations may leave channels that depend on each other.
    """

    def __init__(self, between: Between, channels: int = C) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(C, affine=True)
        nn.init.uniform_(self.bn1.weight, 0.5, 2)
        nn.init.normal_(self.bn1.bias, std=2)
        self.between = between
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1, groups=channels), nn.BatchNorm2d(channels)
        self.prelu, self.prelus, self.relu = nn.PReLU(), nn.PReLU(C), nn.ReLU()
        nn.init.uniform_(self.prelus.weight, -1, 1)
        self.deep, self.wide = nn.Conv2d(C, 2 * C, 1, groups=2), nn.Linear(C, 3)
        self.register_buffer("shift", torch.randn(C, 1, 1))
        self.scale = nn.Parameter(torch.rand(C) + 0.5)
        self.upsample, self.shuffle = nn.Upsample(scale_factor=2), nn.ChannelShuffle(2)
        self.padding = nn.ReflectionPad2d(3)
        self.taps = nn.Parameter(torch.randn(C, 3, 3, 3))
        self.up = nn.ConvTranspose2d(C, 6, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.between(self, self.bn1(x))))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, dim=1)
    return a, b


def shuffled(self: Independent, x: Tensor) -> Tensor:
    """As in torchvision's ShuffleNet."""
    batchsize, num_channels, height, width = x.size()
    x = F.relu(x).view(batchsize, 2, num_channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batchsize, num_channels, height, width)


def shuffled_otherwise(self: Independent, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return x.reshape((b, -1, 2, h, w)).permute(0, 2, 1, 3, 4).flatten(1, 2)


def shuffled_twice(self: Independent, x: Tensor) -> Tensor:
    """Back and forth: the second time the parts have changed places."""
    n, _, h, w = x.shape
    parts = x.view(n, 2, -1, h, w).transpose(1, 2)
    return torch.cat([parts.transpose(1, -4).reshape(n, -1, h, w), parts.flatten(1, 2)], 1)


def divided_unevenly(self: Independent, x: Tensor) -> Tensor:
    a, b = torch.split(x, [1, C - 1], dim=1)
    return torch.cat([F.relu(b), a], -3)


def split_by_size(self: Independent, x: Tensor) -> Tensor:
    parts = x.split(3, 1)
    return torch.cat((parts[-1], F.silu(parts[0])), dim=1)


def channels_last(self: Independent, x: Tensor) -> Tensor:
    """A linear layer over the channels, as in ConvNeXt's blocks."""
    return self.wide(F.gelu(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def standardized(self: Independent, x: Tensor) -> Tensor:
    """Weight standardization: weights that are made of parameters."""
    w = self.deep.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, w, self.deep.bias, groups=2)


def sliced(self: Independent, x: Tensor) -> Tensor:
    return torch.cat([x[:, 3:], x[:, :2] * 2, x[:, ::2, 1:], x.narrow(1, 1, 2)][:2], 1)


def multiplied_in_place(self: Independent, x: Tensor) -> Tensor:
    x.mul_(2)
    x += 1
    x /= 4
    return x


def swish_in_place(self: Independent, x: Tensor) -> Tensor:
    return x.mul_(x.sigmoid())


CASES: dict[str, tuple[Between, int]] = {
    "leaky relu": (lambda self, x: F.leaky_relu(x, 0.2, inplace=True), C),
    "prelu": (lambda self, x: self.prelu(x), C),
    "prelu per channel": (lambda self, x: self.prelus(x), C),
    "F.prelu": (lambda self, x: F.prelu(x, self.prelus.weight), C),
    "relu6": (lambda self, x: F.relu6(x), C),
    "hardtanh": (lambda self, x: F.hardtanh(x, -1.0, 0.5), C),
    "clamp": (lambda self, x: x.clamp(-1, 1), C),
    "clamp(min=)": (lambda self, x: torch.clamp(x, min=-0.5), C),
    "sigmoid": (lambda self, x: torch.sigmoid(x), C),
    "hardsigmoid": (lambda self, x: F.hardsigmoid(x), C),
    "silu": (lambda self, x: F.silu(x, inplace=True), C),
    "hardswish": (lambda self, x: F.hardswish(x), C),
    "gelu": (lambda self, x: F.gelu(x, approximate="tanh"), C),
    "tanh": (lambda self, x: x.tanh(), C),
    "elu": (lambda self, x: F.elu(x, 0.5), C),
    "selu": (lambda self, x: F.selu(x), C),
    "mish": (lambda self, x: F.mish(x), C),
    "softplus": (lambda self, x: F.softplus(x, beta=2), C),
    "x * sigmoid(x)": (lambda self, x: x * torch.sigmoid(x), C),
    "sigmoid(2x) * 2x": (lambda self, x: torch.sigmoid(y := x * 2) * y, C),
    "x.mul_(x.sigmoid())": (swish_in_place, C),
    "x * relu6(x + 3) / 6": (lambda self, x: x * (F.relu6(x + 3) / 6), C),
    "x * tanh(softplus(x))": (lambda self, x: x * torch.tanh(F.softplus(x)), C),
    "x * 0.5": (lambda self, x: x * 0.5, C),
    "2 * x + 1": (lambda self, x: 2 * x + 1, C),
    "1 - x": (lambda self, x: 1 - x, C),
    "-x / 4 - 2": (lambda self, x: -x / 4 - 2, C),
    "in place with constants": (multiplied_in_place, C),
    "x - buffer": (lambda self, x: x - self.shift, C),
    "buffer - x": (lambda self, x: self.shift - x, C),
    "layer scale": (lambda self, x: x.mul(self.scale.view(1, -1, 1, 1)), C),
    "x / parameter": (lambda self, x: x / self.scale[:, None, None].exp(), C),
    "scale of the channels, last": (lambda self, x: (x.permute(0, 2, 3, 1) * self.scale).permute(0, 3, 1, 2), C),
    "difference": (lambda self, x: operator.sub(*halves(x)), C // 2),
    "product": (lambda self, x: operator.mul(*halves(x)), C // 2),
    "gated linear unit": (lambda self, x: halves(x)[0] * torch.sigmoid(halves(x)[1]), C // 2),
    "halves exchanged": (lambda self, x: torch.cat(halves(x)[::-1], 1), C),
    "split unevenly": (divided_unevenly, C),
    "split by size": (split_by_size, 5),
    "slices": (sliced, C - 1),
    "every second channel": (lambda self, x: x[:, ::2], C // 2),
    "shuffle": (shuffled, C),
    "shuffle otherwise": (shuffled_otherwise, C),
    "shuffle twice": (shuffled_twice, 2 * C),
    "shuffle module": (lambda self, x: self.shuffle(x), C),
    "channels last": (channels_last, 3),
    "grouped convolution as a function": (lambda self, x: F.conv2d(x, self.deep.weight, None, groups=2), 2 * C),
    "weight standardization": (standardized, 2 * C),
    "transposed convolution": (lambda self, x: F.conv_transpose2d(x, self.taps, None, 1, 1, 0, 2), 6),
    "transposed, stride 2": (lambda self, x: F.conv_transpose2d(x, self.taps, None, stride=2, groups=2), 6),
    "transposed, some pixels without taps": (lambda self, x: F.conv_transpose2d(x, self.taps, None, 4, groups=2), 6),
    "transposed, dilated": (
        lambda self, x: F.conv_transpose2d(x, self.taps, None, (3, 2), 2, 0, 2, (2, 1)),
        6,
    ),
    "transposed convolution module": (lambda self, x: self.up(x, [256, 256]), 6),
    "pixel shuffle": (lambda self, x: F.pixel_shuffle(x, 2), 2),
    "pixel unshuffle": (lambda self, x: F.pixel_unshuffle(x, 2), 4 * C),
    "nearest": (lambda self, x: F.interpolate(x, scale_factor=2), C),
    "upsampling module": (lambda self, x: self.upsample(x), C),
    "reflected border": (lambda self, x: self.padding(x), C),
    "axes there and back": (lambda self, x: x[:, :, None].squeeze(2).transpose(1, 3).swapaxes(3, 1).unsqueeze(0)[0], C),
}


@pytest.mark.parametrize("case", CASES)
def test_the_prior_is_what_a_large_sample_shows(case: str) -> None:
    between, channels = CASES[case]
    net = Independent(between, channels)
    x = torch.randn(2, C, 128, 128)
    model = convert(net, "bkn", belief="output")
    assert belief_report(model, x)["bn2"] is None
    spy = Spy(model)
    with torch.no_grad():
        model(x)
        assert error(convert(net, "bn")(x), net(x)) < 1e-6
    prior, measured = spy.prior["bn2"], Belief(spy.input["bn2"].mean((0, 2, 3)), spy.input["bn2"].var((0, 2, 3)))
    assert prior is not None
    assert ((prior.mean[0] - measured.mean).abs() <= 0.05 * measured.var.sqrt()).all()
    assert ((prior.var[0] / measured.var).log().abs() <= 0.08).all()


DIMENSIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, (4096,)),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, (32, 32, 32)),
}


def of_dimension(dimension: int) -> tuple[nn.Sequential, Tensor]:
    """A network on pixels along one axis, or three; its first normalizer's output is what its belief says."""
    convolution, transposed, batch_norm, maximum, average, size = DIMENSIONS[dimension]
    layers = [
        batch_norm(C),
        convolution(C, 6, 3, stride=2, dilation=2, groups=2),
        batch_norm(6),
        nn.ReLU(),
        transposed(6, 4, 3, stride=2),
        batch_norm(4),
        maximum(2),
        convolution(4, 4, 1),
        batch_norm(4),
        average(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers), torch.randn(4, C, *size)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_pixels_along_one_axis_or_three(dimension: int) -> None:
    net, x = of_dimension(dimension)
    assert error(convert(net, "bn")(x), net(x)) < 1e-6
    for options in ({"stat_batch": 2}, {"stat_batch": 2, "predictor": "sampling"}):
        model = convert(net, "bkn", belief="output", **options)
        report = belief_report(model, x)
        assert [name for name, why in report.items() if why is not None] == ["0"], report
        spy = Spy(model)
        model(x).square().sum().backward()
        prior, measured = spy.prior["2"], spy.input["2"]
        pixels = (0, *range(2, measured.dim()))
        mean, var = measured.mean(pixels), measured.var(pixels)
        assert prior is not None and ((prior.mean.mean(0) - mean).abs() <= 0.1 * var.sqrt()).all()
        assert ((prior.var.mean(0) / var).log().abs() <= 0.15).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("norm", ["wn", "none"])
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_weight_norm_along_one_axis_or_three(dimension: int, norm: str) -> None:
    """Nothing that had a normalizer is left without a bias, or a norm of its weight."""
    net, x = of_dimension(dimension)
    for layer in (net[1], net[4]):
        layer.bias = None
    model = convert(net, norm)
    initialize_weight_norm(model, x)
    assert model[1].bias is not None and model[4].bias is not None
    if norm == "wn":
        y = model[:5](x)
        pixels = (0, *range(2, y.dim()))
        assert y.mean(pixels).abs().max() < 1e-4 and (y.var(pixels) - 1).abs().max() < 1e-3
    with pytest.raises(ValueError, match="transposed convolution with 2 groups"):
        convert(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)), "wn")


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_spectral_norm_advances_once_a_step(kind: type[nn.Conv2d]) -> None:
    """The weight is read once, for the map and for its belief."""
    layer = spectral_norm(kind(C, C, 3))
    net = nn.Sequential(nn.BatchNorm2d(C), layer, nn.BatchNorm2d(C)).train()
    models = [net, convert(net, "bkn")]
    x = torch.randn(4, C, 8, 8)
    for model in models:
        model(x)
    vectors = [list(model[1].parametrizations.weight.buffers()) for model in models]
    assert len(vectors[0]) == 2
    for a, b in zip(*vectors, strict=True):
        assert torch.equal(a, b)


# --- gates and heads, whose pooled values have the belief of their map: by hand ---


class Excited(nn.Module):
    """Squeeze-and-excitation between two normalizers, in some of its spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)
        self.first, self.second = nn.Linear(C, 2), nn.Linear(2, C)
        self.conv2, self.bn2 = nn.Conv2d(C, 5, 3), nn.BatchNorm2d(5)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.spelling == "convolutions":
            x = x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))
        elif self.spelling == "mean":
            x *= torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        elif self.spelling == "expanded":
            gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, (1, 1))))))
            x = x * gate.expand_as(x)
        else:
            gate = {"view": lambda: self.pool(x).view(x.size(0), -1), "flat": lambda: self.pool(x).flatten(1)}.get(
                self.spelling, lambda: x.mean([-2, -1])
            )()
            gate = torch.sigmoid(self.second(F.relu(self.first(gate))))
            gate = gate.view(x.size(0), x.size(1), 1, 1) if self.spelling == "view" else gate[:, :, None, None]
            x = gate * x
        return self.bn2(self.conv2(x))


@pytest.mark.parametrize("norm", ["bkn", "gkn"])
@pytest.mark.parametrize("spelling", ["convolutions", "mean", "expanded", "view", "flat", "linear"])
def test_squeeze_and_excitation(spelling: str, norm: str) -> None:
    net = Excited(spelling)
    model = convert(net, norm, **({} if norm == "gkn" else {"stat_batch": 2}))
    assert belief_report(model, torch.randn(4, 3, 10, 10))["bn2"] is None
    spy = Spy(model)
    model(torch.randn(4, 3, 10, 10))
    x = rules.relu(spy.handed_on["bn1"])
    if spelling in ("convolutions", "mean", "expanded"):
        layers = [(net.down.weight, net.down.bias), (net.up.weight, net.up.bias)]
        hidden = rules.relu(rules.conv(x, *layers[0]))
        gate = activations.sigmoid(rules.conv(hidden, *layers[1]))
    else:
        hidden = rules.relu(rules.linear(x, net.first.weight, net.first.bias))
        gate = activations.sigmoid(rules.linear(hidden, net.second.weight, net.second.bias))
    gated = rules.multiply(x, gate)
    same_belief(spy.prior["bn2"], rules.conv(gated, net.conv2.weight, net.conv2.bias))


class Head(nn.Module):
    """Maps, then fully connected layers with BatchNorm1d."""

    def __init__(self, flat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.flat = flat
        self.fc, self.bn2, self.out = nn.Linear(C, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.bn3 = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(F.relu(self.bn1(self.conv(x))))
        return self.bn3(self.out(F.relu(self.bn2(self.fc(x)))))


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
    "squeeze each": lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True).squeeze(-1).squeeze(-1),
    "mean": lambda x: x.mean(dim=(2, 3)),
    "pixel": lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "view": lambda x: F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1),
    "mean of the channels, last": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str) -> None:
    net = Head(HEADS[head])
    model = convert(net, "bkn", stat_batch=2)
    spy = Spy(model)
    model(torch.randn(4, 3, 8, 8))
    assert belief_report(model)["bn2"] is None and belief_report(model)["bn3"] is None
    x = rules.relu(spy.handed_on["bn1"])
    same_belief(spy.prior["bn2"], rules.linear(x, net.fc.weight, net.fc.bias))


def test_a_head_on_pixels_loses_the_belief_once() -> None:
    """Flattened pixels are no channels; behind the next normalizer there is a belief again."""
    net = Head(lambda x: torch.flatten(x[:, :, :2, :1], 1))
    net.fc = nn.Linear(2 * C, 5)
    report = belief_report(convert(net, "bkn"), torch.randn(4, 3, 8, 8))
    assert "flatten" in str(report["bn2"]) and report["bn3"] is None


def test_sampling_takes_other_activations_in_closed_form() -> None:
    net = Independent(lambda self, x: F.silu(x))
    model = convert(net, "bkn", belief="output", predictor="sampling")
    spy = Spy(model)
    with torch.no_grad():
        model(torch.randn(2, C, 64, 64))
        closed = Spy(other := convert(net, "bkn", belief="output"))
        other(torch.randn(2, C, 64, 64))
    found, expected = spy.prior["bn2"], closed.prior["bn2"]
    assert found is not None and expected is not None
    assert error(found.mean, expected.mean) < 0.05 and error(found.var, expected.var) < 0.1
