"""Which belief reaches a normalizer, against computation by hand; what loses a belief is named, never passed over."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TABLE_2, Chain, Middle, Moody, Perceptron, Residual, Spy, conv3x3, error, quick
from helpers import same_belief as same
from torch import Tensor, nn

from kalmannorm import Belief, belief_report, convert, set_statistics
from kalmannorm.models import ARCHS, LAST_NORMALIZERS
from kalmannorm.norm import moments as rules
from kalmannorm.norm.sampling import Noise

INPUT_BELIEF = (torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1.0, 0.5, 2.0]))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def through(module: nn.Module, b: Belief) -> Belief:
    return rules.conv(b, module.weight, module.bias, module.groups)  # type: ignore[arg-type]


# --- operations between two normalizers ---


def drop_method(self: Chain, x: Tensor) -> Tensor:
    x.relu_()
    return x


def drop_function(self: Chain, x: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return x


def drop_positional(self: Chain, x: Tensor) -> Tensor:
    F.relu(x, True)
    return x


def drop_torch_function(self: Chain, x: Tensor) -> Tensor:
    torch.relu_(x)
    return x


def drop_module(self: Chain, x: Tensor) -> Tensor:
    self.relu_inplace(x)
    return x


def other_name(self: Chain, x: Tensor) -> Tensor:
    """The shortcut of many pre-activation networks: it is rectified along with x."""
    shortcut = x
    out = self.side(self.relu_inplace(x))
    return out + shortcut


def other_name_through_identity(self: Chain, x: Tensor) -> Tensor:
    shortcut = self.identity(x)
    out = self.side(self.relu_inplace(x))
    return out + shortcut


def untouched_shortcut(self: Chain, x: Tensor) -> Tensor:
    return self.side(self.relu(x)) + x


def augmented(self: Chain, x: Tensor) -> Tensor:
    out = self.side(F.relu(x))
    out += x
    return out


def augmented_under_another_name(self: Chain, x: Tensor) -> Tensor:
    shortcut = x
    x += self.side(F.relu(x))
    return shortcut


def added_in_place(self: Chain, x: Tensor) -> Tensor:
    out = self.side(F.relu(x))
    out.add_(x)
    return out


def subsampled_and_padded(self: Chain, x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))


def rectified(b: Belief, _: Chain) -> Belief:
    return rules.relu(b)


def unchanged(b: Belief, _: Chain) -> Belief:
    return b


def plus_side(b: Belief, net: Chain) -> Belief:
    return rules.add(through(net.side, rules.relu(b)), b)


def rectified_plus_side(b: Belief, net: Chain) -> Belief:
    return rules.add(through(net.side, rules.relu(b)), rules.relu(b))


KEPT: dict[str, tuple[Middle, Callable[[Belief, Chain], Belief], int]] = {
    "nothing": (lambda self, x: x, unchanged, 4),
    "relu module": (lambda self, x: self.relu(x), rectified, 4),
    "in-place relu module": (lambda self, x: self.relu_inplace(x), rectified, 4),
    "F.relu": (lambda self, x: F.relu(x), rectified, 4),
    "F.relu(input=)": (lambda self, x: F.relu(input=x), rectified, 4),
    "torch.relu": (lambda self, x: torch.relu(x), rectified, 4),
    "x.relu()": (lambda self, x: x.relu(), rectified, 4),
    "relu_, result dropped": (drop_method, rectified, 4),
    "F.relu in place, result dropped": (drop_function, rectified, 4),
    "F.relu(x, True), result dropped": (drop_positional, rectified, 4),
    "torch.relu_, result dropped": (drop_torch_function, rectified, 4),
    "in-place module, result dropped": (drop_module, rectified, 4),
    "in place under another name": (other_name, rectified_plus_side, 4),
    "in place through an identity": (other_name_through_identity, rectified_plus_side, 4),
    "shortcut": (untouched_shortcut, plus_side, 4),
    "out += x": (augmented, plus_side, 4),
    "x += out, read under another name": (augmented_under_another_name, plus_side, 4),
    "add_, result dropped": (added_in_place, plus_side, 4),
    "torch.add": (lambda self, x: torch.add(x, self.side(self.relu(x))), plus_side, 4),
    "x.add": (lambda self, x: x.add(self.side(self.relu(x))), plus_side, 4),
    "max pooling": (lambda self, x: F.max_pool2d(F.relu(x), 2), rectified, 4),
    "average pooling": (lambda self, x: F.avg_pool2d(x, 2), unchanged, 4),
    "adaptive pooling": (lambda self, x: F.adaptive_avg_pool2d(x, 4), unchanged, 4),
    "pooling modules": (lambda self, x: self.pool(self.identity(x)), unchanged, 4),
    "dropout": (lambda self, x: F.dropout(x, 0.1, self.training), unchanged, 4),
    "stochastic depth": (lambda self, x: x + self.depth(self.side(F.relu(x))), plus_side, 4),
    "clone": (lambda self, x: x.clone().contiguous(), unchanged, 4),
    "cat": (
        lambda self, x: torch.cat([x, F.relu(x), self.side(x)], 1),
        lambda b, net: rules.concat([b, rules.relu(b), through(net.side, b)]),
        12,
    ),
    "cat(tensors=, dim=)": (
        lambda self, x: torch.cat(tensors=[x, x], dim=1),
        lambda b, net: rules.concat([b, b]),
        8,
    ),
    "pixel padding": (lambda self, x: F.pad(x, (1, 1, 1, 1)), unchanged, 4),
    "x * number of the input's": (lambda self, x: x * (x.shape[2] - 7), unchanged, 4),
    "view": (lambda self, x: x.view(x.shape[0], 4, 8, 8), unchanged, 4),
    "sizes of another map": (
        lambda self, x: x.view(x.size(0), -1, self.pool(x).size(2) * 2, x.size(3)),
        unchanged,
        4,
    ),
    "transposed map": (lambda self, x: x.transpose(2, 3), unchanged, 4),
    "channel padding": (subsampled_and_padded, lambda b, net: rules.pad_channels(b, 1, 2), 7),
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("norm", ["bkn", "gkn"])
def test_belief_between_two_normalizers(norm: str, case: str) -> None:
    middle, rule, channels = KEPT[case]
    net = Chain(middle, channels)
    options: dict[str, Any] = {} if norm == "gkn" else {"stat_batch": 2}
    model = convert(net, norm, **options)
    spy = Spy(model)
    x = torch.randn(4, 3, 8, 8)
    model(x)
    assert belief_report(model, x)["bn2"] is None and spy.prior["bn1"] is None
    same(spy.prior["bn2"], through(net.conv2, rule(spy.handed_on["bn1"], net)))
    outputs = []
    for network in (net, convert(net, "bn")):
        torch.manual_seed(1)  # dropout
        outputs.append(network(x))
    assert torch.equal(*outputs)  # the feature itself is what it was


def through_a_view(self: Chain, x: Tensor) -> Tensor:
    x.flatten(2).relu_()
    return x


def through_a_piece(self: Chain, x: Tensor) -> Tensor:
    x[:, :2].relu_()
    return x


def in_place_of_dropout(self: Chain, x: Tensor) -> Tensor:
    """Dropout returns its input itself in evaluation."""
    F.dropout(x, 0.5, self.training).relu_()
    return x


def raised_under_another_name(self: Chain, x: Tensor) -> Tensor:
    other = x
    x **= 2
    return other


LOST: dict[str, tuple[Middle, str]] = {
    "x * map": (lambda self, x: x * torch.ones(8, 8), "mul.*one number per channel"),
    "x * per image": (lambda self, x: x * x.new_ones(x.shape[0], 1, 1, 1), "new_ones"),
    "x * x": (lambda self, x: x * x, "mul.*itself"),
    "x * f(x)": (lambda self, x: x * F.leaky_relu(x * 2), "mul.*itself"),
    "x + f(x)": (lambda self, x: F.relu(x) + torch.tanh(x), "add.*itself"),
    "x / y": (lambda self, x: x / self.side(x).exp(), "exp|div"),
    "1 / x": (lambda self, x: 1 / (x + 30), "div"),
    "function without a rule": (lambda self, x: F.hardshrink(x), "hardshrink"),
    "module without a rule": (lambda self, x: self.norm(x), "norm.*GroupNorm"),
    "sum with what has none": (lambda self, x: x + self.side(F.hardshrink(x)), "hardshrink"),
    "permutation": (lambda self, x: x.flip(1), "flip"),
    "linear layer over a map's last axis": (lambda self, x: F.linear(x, self.matrix), "linear.*not the channels"),
    "mean over channels": (lambda self, x: x - x.mean(1, keepdim=True), "mean"),
    "weighted sum": (lambda self, x: torch.add(x, self.side(x), alpha=2), "add.*weights"),
    "padding with ones": (lambda self, x: F.pad(x, (0, 0, 0, 0, 0, 0), value=1.0), "pad"),
    "padding of pixels and channels": (lambda self, x: F.pad(x, (1, 1, 1, 1, 0, 0))[:, :4] * x.var(), "var|mul"),
    "cat of pixels": (lambda self, x: torch.cat([x, x], 2), "cat"),
    "other images": (lambda self, x: torch.cat([x[:1], x[1:]], 0), "getitem|cat"),
    "stack": (lambda self, x: torch.stack(x.chunk(2, 1), 1).flatten(1, 2), "stack"),
    "resizing": (lambda self, x: F.interpolate(x, scale_factor=2, mode="bilinear"), "interpolate.*bilinear"),
    "maximum of a map": (lambda self, x: x + F.adaptive_max_pool2d(x, 1), "adaptive_max_pool2d"),
    "weights made of features": (lambda self, x: F.conv2d(x, self.side.weight * x.mean(), padding=1), "conv2d"),
    "in place through a view": (through_a_view, "relu_.*in place"),
    "in place through a piece": (through_a_piece, "relu_.*in place"),
    "x **= 2, read under another name": (raised_under_another_name, "pow"),
    "in place of dropout's result": (in_place_of_dropout, "relu_.*in place"),
}


@pytest.mark.parametrize("case", LOST)
def test_operations_that_lose_a_belief_are_reported(case: str) -> None:
    """By name; the next normalizer measures only."""
    middle, name = LOST[case]
    net = Chain(middle)
    model = convert(net, "bkn", stat_batch=2)
    x = torch.randn(4, 3, 8, 8)
    reason = belief_report(model, x)["bn2"]
    assert reason is not None and re.search(name, reason), reason
    spy = Spy(model)
    y = model(x)
    assert spy.prior["bn2"] is None
    assert error(y.detach(), convert(net, "bn", stat_batch=2)(x).detach()) < 1e-5


@pytest.mark.parametrize("predictor", ["closed", "sampling"])
def test_a_subclass_that_computes_something_else_is_no_relu(predictor: str) -> None:
    class Odd(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input + 3 if input.sum() > 0 else input  # which torch.fx cannot look into

    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Odd(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    net = convert(nn.Sequential(*layers), "bkn", stat_batch=2, predictor=predictor)
    assert "Odd" in str(belief_report(net, torch.randn(4, 3, 8, 8))["4"])


def test_report_per_normalizer() -> None:
    model = convert(Residual(), "bkn", stat_batch=2)
    x = torch.randn(4, 3, 8, 8)
    report = belief_report(model, x)
    assert list(report) == ["bn", "bn1", "bn2", "shortcut.1"]  # network order
    assert report["bn"] is not None and "no normalizer before it" in report["bn"]
    assert report["bn1"] is report["bn2"] is report["shortcut.1"] is None
    assert not belief_report(convert(Residual(), "bn")) and not belief_report(convert(Residual(), "gn"))
    with pytest.raises(ValueError, match=r"not called yet: .*belief_report\(model, x\)"):
        belief_report(model)
    model(x)
    assert belief_report(model) == belief_report(model, x)


@pytest.mark.parametrize("norm", ["bkn", "gkn"])
@pytest.mark.parametrize(
    "name",
    quick((name for name in ARCHS if name not in TABLE_2), "inception_cifar", "resnet14", "resnet14_preact"),
)
def test_all_normalizers_of_the_architectures_but_the_first_have_a_prior(name: str, norm: str) -> None:
    videos = name.startswith("i3d")
    x = torch.randn(2, 3, *((8, 32, 32) if videos else (64, 64)))
    report = belief_report(convert(ARCHS[name](), norm), x)
    assert [layer for layer, why in report.items() if why] == [next(iter(report))]
    assert set(LAST_NORMALIZERS[name]) <= set(report)
    with_input = belief_report(convert(ARCHS[name](), norm, input_belief=INPUT_BELIEF), x)
    assert list(with_input) == list(report) and not any(with_input.values())


@pytest.mark.parametrize("norm", ["bkn", "gkn"])
def test_belief_of_the_input(norm: str) -> None:
    """Paper 3.3: the first normalizer has a prior too; convolutions with a bias shift it."""
    net = Residual()
    model = convert(net, norm, input_belief=INPUT_BELIEF)
    spy = Spy(model)
    model(torch.randn(4, 3, 8, 8))
    assert belief_report(model)["bn"] is None
    same(spy.prior["bn"], through(net.conv, Belief(*(t[None] for t in INPUT_BELIEF))))
    assert not any("input" in key for key in model.state_dict())


@pytest.mark.parametrize("input_belief", [(torch.zeros(3),), (torch.zeros(3), torch.ones(2))], ids=["one", "unequal"])
def test_belief_of_the_input_of_a_wrong_shape(input_belief: Any) -> None:
    with pytest.raises(ValueError, match="input_belief"):
        convert(Residual(), "bkn", input_belief=input_belief)


def test_fully_connected_layers_predict() -> None:
    """Convolution and linear."""
    net = Perceptron()
    model = convert(net, "bkn", stat_batch=4)
    spy = Spy(model)
    model(torch.randn(8, 3))
    assert belief_report(model)["bn2"] is None
    same(spy.prior["bn2"], rules.linear(rules.relu(spy.handed_on["bn1"]), net.fc2.weight, net.fc2.bias))


def test_residual_block_by_hand() -> None:
    """Shortcut convolution, grouped convolution, in-place sum and ReLU: every prior of the network."""
    net = Residual()
    model = convert(net, "bkn", stat_batch=2)
    spy = Spy(model)
    model(torch.randn(4, 3, 8, 8))
    stem = rules.relu(spy.handed_on["bn"])
    same(spy.prior["bn1"], through(net.conv1, stem))
    same(spy.prior["shortcut.1"], through(net.shortcut[0], stem))  # type: ignore[arg-type]
    same(spy.prior["bn2"], through(net.conv2, rules.relu(spy.handed_on["bn1"])))


def test_training_graph_with_parts_of_its_own() -> None:
    model = convert(Moody(), "bkn", stat_batch=2)
    spy = Spy(model)
    model(torch.randn(4, 3, 8, 8))
    same(spy.prior["aux_bn"], through(model.aux_conv, rules.relu(spy.handed_on["bn"])))


@pytest.mark.parametrize("statistics", ["moving", "online"])
def test_beliefs_in_evaluation(statistics: str) -> None:
    """Online: as in training. Moving: the running values are handed on, in one row."""
    net = Residual()
    model = convert(net, "bkn", stat_batch=2)
    model(torch.randn(4, 3, 8, 8))
    set_statistics(model.eval(), statistics)
    spy = Spy(model)
    model(torch.randn(4, 3, 8, 8))
    assert all(b.mean.shape[0] == (1 if statistics == "moving" else 2) for b in spy.handed_on.values())
    same(spy.prior["bn1"], through(net.conv1, rules.relu(spy.handed_on["bn"])))
    if statistics == "moving":
        assert torch.equal(spy.handed_on["bn1"].mean[0], model.bn1.running_mean)


def test_output_belief_travels() -> None:
    net = Residual()
    model = convert(net, "bkn", stat_batch=2, belief="output")
    spy = Spy(model)
    model(torch.randn(4, 3, 8, 8))
    same(spy.prior["bn1"], through(net.conv1, rules.relu(Belief(net.bn.bias[None], net.bn.weight.square()[None]))))


def test_relu_option() -> None:
    """Without it beliefs pass through ReLUs as the paper's equations are printed."""
    for options in ({}, {"predictor": "sampling"}):
        net = Chain(lambda self, x: F.relu(x))
        model = convert(net, "bkn", stat_batch=2, relu=False, **options)
        spy = Spy(model)
        model(torch.randn(4, 3, 8, 8))
        before = spy.handed_on["bn1"]
        expected = through(net.conv2, before) if not options else sampled_by_hand(net, before, spy, relu=False)
        same(spy.prior["bn2"], expected)


# --- the sampling predictor in a network ---


def sampled_by_hand(net: Chain, b: Belief, spy: Spy, relu: bool) -> Belief:
    image = b.mean[:, :, None, None] + b.var.sqrt()[:, :, None, None] * spy.noise["conv2_noise"]
    out = net.conv2(F.relu(image) if relu else image).flatten(2)
    return Belief(out.mean(2), out.var(2, correction=0))


@pytest.mark.parametrize("norm", ["bkn", "gkn"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("middle", "on_the_sample", "closed"),
    [
        (lambda self, x: F.relu(x), True, False),
        (lambda self, x: self.relu_inplace(x), True, False),
        (drop_method, True, False),
        (lambda self, x: F.max_pool2d(F.relu(x), 2), False, True),
        (lambda self, x: x, False, False),
    ],
    ids=["F.relu", "module", "relu_ dropped", "relu and pooling", "no relu"],
)
def test_sampled_prior(middle: Middle, on_the_sample: bool, closed: bool, stride: int, norm: str) -> None:
    """A ReLU directly before the convolution acts on the sample, any other in closed form."""
    net = Chain(middle, stride=stride)
    options: dict[str, Any] = {} if norm == "gkn" else {"stat_batch": 2}
    model = convert(net, norm, predictor="sampling", **options)
    spy = Spy(model)
    for training in (True, False):
        model.train(training)
        set_statistics(model, "online")
        model(torch.randn(4, 3, 8, 8))
        size = 4 if closed else 8
        assert spy.noise["conv2_noise"].shape == (4 if norm == "gkn" else 2, 4, size, size)
        before = spy.handed_on["bn1"]
        expected = sampled_by_hand(net, rules.relu(before) if closed else before, spy, on_the_sample)
        same(spy.prior["bn2"], expected)


def test_sampling_draws_anew_in_training_and_the_same_in_evaluation() -> None:
    model = convert(Residual(), "bkn", stat_batch=2, predictor="sampling")
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    noises = [m for m in model.modules() if isinstance(m, Noise)]
    assert len({noise.layer for noise in noises}) == len(noises) == 3 and all(n.step == 2 for n in noises)
    set_statistics(model.eval(), "online")
    assert torch.equal(model(x), model(x))


class Same(nn.Conv2d):
    """A convolution of a class of its own, which computes the same."""


class Doubling(nn.Conv2d):
    """One that does not."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


@pytest.mark.parametrize("options", [{"predictor": "sampling"}, {"transition": "learned"}, {}], ids=str)
def test_a_subclass_of_a_convolution_is_predicted_by_what_it_computes(options: dict[str, str]) -> None:
    found = []
    for kind in (nn.Conv2d, Same, Doubling):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), kind(4, 4, 3), nn.BatchNorm2d(4))
        found.append(convert(model, "bkn", stat_batch=2, **options))
    plain, same, doubling = found
    x = torch.randn(4, 3, 8, 8)
    assert plain.state_dict().keys() == same.state_dict().keys()
    torch.testing.assert_close(same(x), plain(x))
    with torch.no_grad():
        plain[3].weight *= 2  # type: ignore[index, operator]
        if not options:
            torch.testing.assert_close(doubling(x), plain(x))


def test_sampling_refuses_what_it_does_not_draw() -> None:
    net = Chain(lambda self, x: F.relu(x))
    net.conv2 = conv3x3(4, 5, padding_mode="reflect")
    x = torch.randn(4, 3, 8, 8)
    report = belief_report(convert(net, "bkn", predictor="sampling"), x)
    assert report["bn2"] is not None and "conv2" in report["bn2"] and "reflect" in report["bn2"]
    assert belief_report(convert(net, "bkn", predictor="closed"), x)["bn2"] is None
