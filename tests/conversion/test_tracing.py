"""What convert does with code that torch.fx cannot trace, or would trace wrongly, and with unusual BatchNorm layers."""

import copy
import random
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Chain, Residual, conv3x3, error
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from kalmannorm import belief_report, convert, fold
from kalmannorm.conversion import untraced


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


# --- modules without normalizers that cannot be traced run as they are ---


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


# --- arguments and outputs ---


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


# --- BatchNorm layers that do more than normalize ---


class Activated(nn.BatchNorm2d):
    """Norm and activation in one, as timm's BatchNormAct2d."""

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.act, self.drop = nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.2)
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        training = self.training or self.running_mean is None
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.factor * self.act(self.drop(y))


class Inherited(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input) + 1)


class Renamed(nn.BatchNorm2d):
    """Normalizes and nothing else; made of other arguments."""

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(num_features=features, eps=1e-3, **options)
        self.note = "kept"

    def __repr__(self) -> str:
        return self.note


class ByHand(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        mean, var = input.mean((0, 2, 3), keepdim=True), input.var((0, 2, 3), keepdim=True)
        return (input - mean) / (var + self.eps).sqrt()


class AlwaysMeasuring(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


def pair(kind: type[nn.BatchNorm2d], **options: Any) -> nn.Module:
    model = nn.Sequential(conv3x3(3, 4), kind(4, **options), conv3x3(4, 4), kind(4, **options))
    for layer in (model[1], model[3]):
        if layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("kind", [Activated, Inherited, Renamed])
def test_batch_norm_with_more_in_it(kind: type[nn.BatchNorm2d], options: dict[str, Any]) -> None:
    model = pair(kind, **options).train()
    converted = same_as_original(model, images())
    assert list(model.state_dict()) == [key for key in converted.state_dict() if key in model.state_dict()]
    kalman = convert(model.train(), "bkn", stat_batch=2)
    assert belief_report(kalman, images())["3"] is None
    kalman(images()).sum().backward()
    assert all(p.grad is not None for p in kalman.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in kalman.parameters():
            p.add_(0.1)
    if not kalman.get_submodule("1").track_running_stats:
        with pytest.raises(ValueError, match="has no moving statistics to fold into a BatchNorm"):
            fold(kalman.eval())
        return
    folded = fold(kalman.eval())
    assert type(folded[1]) is kind and list(folded.state_dict()) == list(model.state_dict())
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    if not options:
        assert error(folded(x := images()).detach(), kalman(x).detach()) < 1e-5
        assert convert(kalman, "bn").get_submodule("1") is not kalman.get_submodule("1")


def test_batch_norm_that_is_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^1 \(ByHand\) is a BatchNorm layer that normalizes by code of its own"):
        convert(pair(ByHand), "bn")
    with pytest.raises(ValueError, match=r"1 \(AlwaysMeasuring\) does not normalize as its base class"):
        convert(pair(AlwaysMeasuring), "bn")


class Clashing(Inherited):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.gain_logit = nn.Parameter(torch.zeros(()))


def test_parts_by_the_name_of_a_normalizers_own() -> None:
    convert(pair(Clashing), "bn")
    with pytest.raises(ValueError, match="KalmanBatchNorm2d has a gain_logit of its own"):
        convert(pair(Clashing), "bkn")


def test_a_shared_layer_with_more_in_it() -> None:
    layer = Activated(4)
    model = nn.Sequential(conv3x3(3, 4), layer, conv3x3(4, 4), layer)
    converted = same_as_original(model, images())
    assert converted.get_submodule("1") is converted.get_submodule("3")
    folded = fold(converted)
    assert folded[1] is folded[3] and type(folded[1]) is Activated


# --- FrozenBatchNorm2d ---


def frozen_backbone() -> nn.Module:
    """As in torchvision's detection models."""
    model = IntermediateLayerGetter(resnet18(norm_layer=FrozenBatchNorm2d), {"layer3": "0", "layer4": "1"})
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for value, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.running_mean, -0.1)):
                value.uniform_(low, low + 0.5)
    return model


def test_frozen_batch_norm_is_thawed_on_demand() -> None:
    model = frozen_backbone().eval()
    with pytest.raises(ValueError, match=r"IntermediateLayerGetter has no BatchNorm layer.*20 FrozenBatchNorm2d.*thaw"):
        convert(model, "bkn")
    converted = convert(model, "bkn", stat_batch=2, thaw=True)
    assert type(fold(converted).bn1) is nn.BatchNorm2d
    x = images(4, 64)
    for key, value in converted(x).items():
        assert error(value.detach(), model(x)[key].detach()) < 1e-5
    sum(value.sum() for value in converted.train()(x).values()).backward()
    assert converted.bn1.weight.grad is not None and converted.bn1.bias.grad is not None
    assert [
        key for key in converted.state_dict() if "track" not in key and "gain" not in key and "noise" not in key
    ] == [*model.state_dict()]
    model.load_state_dict(fold(converted).state_dict())  # torchvision's frozen layers leave the counters out


def test_a_belief_passes_frozen_batch_norm() -> None:
    """A constant scale and shift per channel."""
    model = Chain(lambda self, x: self.frozen(x))
    model.frozen = FrozenBatchNorm2d(4)
    model.frozen.running_mean.normal_(), model.frozen.weight.uniform_(0.5, 2)
    converted = same_as_original(model, images())
    assert isinstance(converted.frozen, FrozenBatchNorm2d)
    converted = convert(model, "bkn", belief="output")
    assert belief_report(converted, images())["bn2"] is None
    for network in (model.eval(), converted.eval()):
        network.frozen.running_var.fill_(4)  # what it holds when it runs
    assert error(converted(x := images()).detach(), model(x).detach()) < 1e-5


TARGET = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}


def test_the_backbone_of_a_detection_model() -> None:
    """A whole detector cannot be traced, its backbone can; and it goes on working inside of the detector."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    model = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64).eval()
    whole = convert(model, "bkn", stat_batch=2)
    report = belief_report(whole, [torch.rand(3, 64, 64)] * 2, [TARGET] * 2)
    assert sum(why is None for why in report.values()) == 19 and untraced(whole).keys() >= {"", "transform"}
    x = [torch.rand(3, 64, 64)]
    before = model(x)
    body = model.backbone.body
    assert list(body(x[0][None])) == list(convert(body, "bn")(x[0][None]))
    model.backbone.body = convert(body, "bkn", stat_batch=2)
    assert sum(why is None for why in belief_report(model.backbone.body, torch.randn(2, 3, 64, 64)).values()) == 19
    after = model.eval()(x)
    assert before[0].keys() == after[0].keys() and torch.allclose(before[0]["scores"], after[0]["scores"], atol=1e-5)
    sum(model.train()([x[0], x[0]], [TARGET, TARGET]).values()).backward()
    assert model.backbone.body.bn1.weight.grad is not None


class DetrFrozenBatchNorm2d(nn.Module):
    """As DETR has it in Hugging Face's library: its eps is no attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 2.0), ("bias", 0.5), ("running_mean", 0.3), ("running_var", 4.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (b.view(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_batch_norm_is_known_by_what_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DetrFrozenBatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match=r"its 1 FrozenBatchNorm2d layers are constants: thaw=True"):
        convert(model, "bkn")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(convert(model, "bkn", thaw=True).eval()(x), model(x))


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
