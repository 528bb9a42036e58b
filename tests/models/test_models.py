"""The architectures: sizes that the sources state, initialization, shortcuts, the normalizers of Figure 5."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import TABLE_2, quick
from torch import Tensor, nn

from kalmannorm import belief_report, convert, fold
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.models import ARCHS, LAST_NORMALIZERS
from kalmannorm.models.inception_cifar import FILTERS, InceptionCifar
from kalmannorm.models.inception_v2 import BLOCKS, InceptionV2
from kalmannorm.models.resnet_cifar import Block, PreactBlock, ResNet
from kalmannorm.train.model import build, network

PARAMETERS = {  # at 10 classes
    "inception_cifar": 903_018,
    "resnet14": None,
    "resnet14_preact": None,
    "resnet32": 464_154,
    "resnet32_preact": 464_154,
    "resnet110": 1_727_962,
    "resnet110_preact": 1_727_962,
    "resnet18_cifar": 11_173_962,
    "inception_v2": 11_285_224 - 990 * 1025,
    "resnet50": 25_557_032 - 990 * 2049,
    "resnet101": 44_549_160 - 990 * 2049,
}
IMAGENET = {  # at 1000 classes: parameters with BN and with KN, normalizers, their channels (paper, Table 2)
    "inception_v2": (11_285_224, 11_295_309, 69, 10_016),
    "resnet50": (25_557_032, 25_583_645, 53, 26_560),
    "resnet101": (44_549_160, 44_601_936, 104, 52_672),
}
VIDEOS = {"i3d_resnet50", "i3d_small"}  # test_video.py
SMALLEST = ("inception_cifar", "inception_v2", "resnet14", "resnet14_preact", "resnet50")  # of their kinds
CIFAR = [name for name in PARAMETERS if name not in IMAGENET]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_all_architectures_are_listed_here() -> None:
    assert set(ARCHS) == set(PARAMETERS) | set(TABLE_2) | VIDEOS == set(LAST_NORMALIZERS)


@pytest.mark.parametrize("name", quick(PARAMETERS, *SMALLEST))
def test_size_and_output(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHS[name](classes=10)
    assert PARAMETERS[name] in (None, parameters(model))
    assert ARCHS[name](classes=100).fc.out_features == 100
    for size in (8, 16) if name in CIFAR else (64,):
        out = model(torch.randn(2, 3, size, size))
        assert out.shape == (2, 10) and torch.isfinite(out).all()
    normalizers = {type(m) for m in model.modules() if "norm" in type(m).__name__.lower()}
    assert normalizers == {nn.BatchNorm2d}


@pytest.mark.parametrize("name", quick(PARAMETERS, *SMALLEST))
def test_last_normalizers_see_what_is_pooled(name: str) -> None:
    """Together they have every channel of the pooled feature; only the classifier comes behind."""
    model = ARCHS[name]().eval()
    last = [model.get_submodule(n) for n in LAST_NORMALIZERS[name]]
    assert all(isinstance(m, nn.BatchNorm2d) for m in last)
    wide = {"inception_cifar": 512, "resnet18_cifar": 512, "inception_v2": 1024, "resnet50": 2048, "resnet101": 2048}
    pooled = wide.get(name, 64)
    assert sum(m.num_features for m in last) == model.fc.in_features == pooled
    order: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(lambda m, _, __: order.append(m))
    model(torch.randn(1, 3, 32, 32))
    branches = len(last)
    assert order[-1] is model.fc and order[-2] is last[-1]
    assert set(last) <= set(order[-(2 + 3 * branches) :])


@pytest.mark.parametrize("name", quick(["resnet14", "resnet14_preact", "resnet18_cifar"], "resnet14"))
def test_dropout_is_of_the_pooled_features(name: str) -> None:
    torch.manual_seed(0)
    model = convert(ARCHS[name](dropout=0.5), "bkn", stat_batch=2)
    (dropout,) = (m for m in model.modules() if isinstance(m, nn.Dropout))
    seen: list[Tensor] = []
    dropout.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    x = torch.randn(2, 3, 16, 16)
    model(x)
    (features, dropped) = seen
    assert features.dim() == 2 and 0.3 < (dropped == 0).float().mean() - (features == 0).float().mean() < 0.7
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", ["resnet32", "resnet32_preact", "resnet110", "resnet110_preact"])
def test_depth(name: str) -> None:
    layers = [m for m in ARCHS[name]().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet").removesuffix("_preact"))


@pytest.mark.parametrize("name", ["inception_cifar", "inception_v2", "resnet32", "resnet32_preact", "resnet50"])
def test_he_initialization_by_fan_out(name: str) -> None:
    torch.manual_seed(0)
    for layer in ARCHS[name]().modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is None
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            std, n = layer.weight.std(correction=0).item(), layer.weight.numel()
            assert abs(std / math.sqrt(2 / fan_out) - 1) < 4 / math.sqrt(2 * n)


@pytest.mark.parametrize("width", [1.0, 0.5, 0.25, 0.1])
def test_inception_widths(width: float) -> None:
    model = InceptionCifar(10, width)
    channels = [max(1, round(f * width)) for b1, b3, b5, pool in FILTERS[-1:] for f in (b1, b3[1], b5[1], pool)]
    assert [model.get_submodule(n).num_features for n in LAST_NORMALIZERS["inception_cifar"]] == channels
    assert model.fc.in_features == sum(channels)
    assert parameters(model) < 1.3 * width**1.5 * 903_018
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_inception_table() -> None:
    """Paper 4.3.2: 16 x 16 after the stem, blocks of 256, 480 and 512 channels; 0.23 GMAC an image."""
    model, shapes, work = InceptionCifar(), [], 0

    def count(layer: nn.Conv2d, _: object, out: Tensor) -> None:
        nonlocal work
        work += out.numel() * layer.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    for module in (model.stem, *(m for m in model.modules() if type(m).__name__ == "Inception")):
        module.register_forward_hook(lambda m, _, out: shapes.append(tuple(out.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(32, 16, 16), (256, 16, 16), (480, 16, 16), (512, 16, 16)]
    assert round(work / 1e9, 2) == 0.23


def test_inception_hidden_layer_is_an_option() -> None:
    model = InceptionCifar(10, hidden=1000)
    assert parameters(model) == 903_018 - 5130 + 513 * 1000 + 1001 * 10
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_parameter_free_shortcuts() -> None:
    """Post-activation: subsampled, zero channels behind. Pre-activation: averaged, zero channels on both sides."""
    x = torch.randn(2, 4, 6, 6)
    post = Block(4, 8, 2)
    nn.init.zeros_(post.bn2.weight)
    out = post(x)
    assert torch.equal(out[:, :4], F.relu(x[:, :, ::2, ::2])) and not out[:, 4:].any()
    preact = PreactBlock(4, 8, 2, first=False)
    nn.init.zeros_(preact.conv2.weight)
    out = preact(x)
    assert torch.equal(out[:, 2:6], F.avg_pool2d(x, 2)) and not out[:, :2].any() and not out[:, 6:].any()
    same = PreactBlock(4, 4, 1, first=False)
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_preactivation_order() -> None:
    """The first block takes its input as it is (it is activated), the others normalize it."""
    model = ResNet(2, preact=True)
    first, second = model.blocks[0], model.blocks[1]
    assert isinstance(first.bn1, nn.Identity) and isinstance(second.bn1, nn.BatchNorm2d)
    assert isinstance(model.bn_last, nn.BatchNorm2d) and isinstance(ResNet(2).bn_last, nn.Identity)
    x = torch.randn(4, 16, 8, 8)
    expected = x + second.conv2(F.relu(second.bn2(second.conv1(F.relu(second.bn1(x))))))
    torch.testing.assert_close(second(x), expected)
    expected = x + first.conv2(F.relu(first.bn2(first.conv1(x))))
    torch.testing.assert_close(first(x), expected)


# --- ImageNet's ---


@pytest.mark.parametrize("name", quick(IMAGENET, "inception_v2"))
def test_parameters_at_1000_classes(name: str) -> None:
    """R has one value per channel and q one per normalizer, in those without a prior too."""
    bn, kn, normalizers, channels = IMAGENET[name]
    with torch.device("meta"):  # where nothing is initialized
        model = ARCHS[name]()
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(layers), sum(m.num_features for m in layers)) == (normalizers, channels)
    assert kn == bn + channels + normalizers
    for norm, expected in (("bn", bn), ("gn", bn), ("bkn", kn), ("gkn", kn)):
        assert parameters(convert(model, norm)) == expected


def test_inception_v2_maps() -> None:
    """Channels and pixels behind every block, at 224; what the first block's branches add up to."""
    model, shapes = InceptionV2().eval(), {}
    for name, block in model.blocks.items():
        block.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    channels = [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    sizes = [28, 28, 14, 14, 14, 14, 14, 7, 7, 7]
    assert shapes == {name: (c, s, s) for name, c, s in zip(BLOCKS, channels, sizes, strict=True)}


@pytest.mark.parametrize("size", [32, 33, 47, 64])
def test_inception_v2_at_other_resolutions(size: int) -> None:
    """Convolutions and pooling side by side agree on the size of their maps, odd ones too."""
    model = InceptionV2(10, width=0.1)
    assert parameters(model) < 0.02 * 11_285_224
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("norm", quick(["bkn", "gkn", "gn"], "bkn"))
@pytest.mark.parametrize("name", quick(IMAGENET, "inception_v2"))
def test_converted_networks_train(name: str, norm: str) -> None:
    """Every normalizer but the first has a prior; forward and backward are finite; BKN folds back."""
    torch.manual_seed(0)
    options = {"width": 0.125} if name == "inception_v2" else {"width_per_group": 8}
    plain = ARCHS[name](classes=10, **options)
    model = convert(plain, norm, **({"stat_batch": 2} if norm == "bkn" else {}))
    first = "conv1.bn" if name == "inception_v2" else "bn1"
    x = torch.randn(4, 3, 64, 64)
    lost = [layer for layer, why in belief_report(model, x).items() if why]
    assert lost == ([] if norm == "gn" else [first])
    model(x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) >= len(list(plain.parameters()))
    if norm == "bkn":
        model.eval()
        folded = fold(model)
        assert list(folded.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_runs_of_the_new_architectures_are_built_from_their_configuration() -> None:
    small = ["dataset=cifar10", "budget=smoke", "device=cpu", "budget.size=32"]
    model, last = build(compose([*small, "arch=inception_v2", "arch.width=0.125"]))
    assert last == LAST_NORMALIZERS["inception_v2"] and model.fc.out_features == 10
    model = network(compose([*small, "arch=resnet50", "norm=gn", "+arch.width_per_group=8"]))
    assert model.fc.out_features == 10
    with pytest.raises(UserError, match=r"arch resnet50: .*'width'"):
        network(compose([*small, "arch=resnet50", "+arch.width=0.5"]))
