"""What convert does with BatchNorm layers that do more than normalize, and with frozen ones of any origin."""

import copy
import pickle
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from helpers import Chain, conv3x3, error, images, same_as_original
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
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


class WithOptions(nn.BatchNorm2d):
    act: nn.Module

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.act, self.calls, self.rate = nn.ReLU(), 0, 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None, act: bool = True) -> Tensor:
        self.calls += 1
        y = super().forward(x) * self.rate
        y = self.act(y) if act else y
        return y if mask is None else y * mask


class ForWhatIsThere(nn.BatchNorm2d):
    """As detection libraries have it, for batches of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.numel() > 0 else x.new_empty(x.shape)


class InSingle(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            mean, var = self.running_mean, self.running_var
            measures = self.training or mean is None
            y = F.batch_norm(x.float(), mean, var, self.weight, self.bias, measures, self.momentum or 0.1, self.eps)
            return y.to(x.dtype)


class AsALine(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2)).view_as(x)


WITHOUT_GRAPHS = [WithOptions, ForWhatIsThere, InSingle, AsALine]


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn", "brn", "sn"])
@pytest.mark.parametrize("kind", WITHOUT_GRAPHS)
def test_batch_norm_with_a_forward_that_no_graph_has(kind: type[nn.BatchNorm2d], norm: str) -> None:
    """It runs as it is, around the new normalizer."""
    model, x = pair(kind), images()
    kalman = convert(model, norm, stat_batch=2)
    if norm in ("bkn", "gkn"):
        assert belief_report(kalman, x)["3"] is None
    kalman = pickle.loads(pickle.dumps(copy.deepcopy(kalman)))
    kalman(x).sum().backward()
    assert all(p.grad is not None for p in kalman.parameters() if p.requires_grad)
    for counted in (layer for layer in kalman if hasattr(layer, "num_batches_tracked")):
        assert counted.num_batches_tracked == 1
    if norm in ("bn", "bkn", "brn"):
        folded = fold(kalman.eval())
        assert type(folded[1]) is kind and error(folded(x).detach(), kalman(x).detach()) < 1e-5
    if norm == "bn":
        same_as_original(model.train(), x)
        assert torch.equal(convert(model.train(), "bn")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn", "brn", "sn"])
@pytest.mark.parametrize("kind", WITHOUT_GRAPHS)
def test_batch_norm_with_a_forward_that_no_graph_has_is_compiled(kind: type[nn.BatchNorm2d], norm: str) -> None:
    model, x = convert(pair(kind), norm, stat_batch=2).eval(), images()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_what_a_forward_of_batch_norm_is_told() -> None:
    layer, mask = pair(WithOptions)[1], torch.zeros(())
    converted = convert(nn.Sequential(layer), "bn")[0]
    conv = torch.randn(4, 4, 6, 6)
    for options in ({}, {"act": False}, {"mask": mask}):
        assert torch.equal(converted(conv, **options), layer(conv, **options))
    converted.rate = layer.rate = 2.0
    assert torch.equal(converted(conv), layer(conv)) and converted.calls == layer.calls == 4


class Kept(nn.BatchNorm2d):
    """Always in evaluation."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def deviations(self) -> Tensor:
        return self.running_var.sqrt()


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_methods_of_batch_norm_are_kept(norm: str) -> None:
    model, x = pair(Kept).train(), images()
    converted = pickle.loads(pickle.dumps(convert(model, norm, stat_batch=2))).train()
    assert error(converted(x).detach(), model(x).detach()) < 1e-5
    assert (
        torch.equal(converted[1].deviations(), model[1].deviations())
        and converted.training
        and not converted[1].training
    )
    assert type(fold(converted)[1]) is Kept


def test_batch_norm_that_is_something_else_is_left_as_it_is() -> None:
    plain = pair(nn.BatchNorm2d)
    model = nn.Sequential(*plain[:3], ByHand(4), *copy.deepcopy(plain[2:]))
    with pytest.warns(UserWarning, match=r"3 \(ByHand\).* by code of its own.*: it is left as it is"):
        converted = convert(model, "bkn", stat_batch=2)
    assert isinstance(converted[3], ByHand) and torch.isfinite(converted(images())).all()
    report = belief_report(converted, images())
    assert "mean" in str(report["5"]) and "by code of its own" in str(report["3"])
    assert type(fold(converted)[3]) is ByHand


class Called(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_batch_norm_with_a_call_of_its_own_is_left_as_it_is(norm: str) -> None:
    model = nn.Sequential(*pair(nn.BatchNorm2d)[:3], Called(4)).eval()
    with pytest.warns(UserWarning, match=r"3 \(Called\) is a BatchNorm layer with a __call__ of its own: it is left"):
        converted = convert(model, norm)
    x = images()
    torch.testing.assert_close(converted(x), model(x))


def test_batch_norm_that_is_something_else_is_refused() -> None:
    """Where there is no other."""
    with pytest.raises(ValueError, match=r"^1 \(ByHand\) is a BatchNorm layer that normalizes by code of its own"):
        convert(pair(ByHand), "bn")
    with pytest.raises(ValueError, match=r"1 \(AlwaysMeasuring\) does not normalize as its base class"):
        convert(pair(AlwaysMeasuring), "bn")


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_computed_weights_of_batch_norm_are_refused() -> None:
    """They would be constants from then on, or their hooks would miss what they compute them of."""
    for compute in (
        lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        compute((model := pair(nn.BatchNorm2d))[1])
        with pytest.raises(ValueError, match=r"^1 \(.*BatchNorm2d\): its weight is computed.* make it permanent"):
            convert(model, "bkn", stat_batch=2)
        compute((converted := convert(pair(nn.BatchNorm2d), "bkn", stat_batch=2))[1])
        converted(images()).square().sum().backward()


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


@pytest.mark.slow
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


class Ahead(nn.Module):
    """Normalizes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = Activated(3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


@pytest.mark.filterwarnings("error")
def test_a_layer_that_does_more_is_traced_without_a_warning() -> None:
    assert untraced(convert(Ahead(), "bkn", stat_batch=2)) == {}
