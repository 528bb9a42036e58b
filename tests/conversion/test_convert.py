"""convert: what is kept, modes, names, errors (also: test_converted.py, test_thread.py, test_compile.py)."""

import copy
import linecache
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FEW,
    MODELS,
    SAMPLING,
    Chain,
    Moody,
    Perceptron,
    Residual,
    conv3x3,
    equal_states,
    images,
    loss_of,
    quick,
    trained,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm import NORMS, belief_report, convert, fold
from kalmannorm.conversion import untraced
from kalmannorm.conversion.report import NOTHING


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- what is kept ---


@pytest.mark.parametrize("norm", ["bn", "bkn", "gn", "gkn"])
@pytest.mark.parametrize("name", quick(MODELS, *FEW))
def test_state_dict_keys_are_kept_in_order(name: str, norm: str) -> None:
    model = MODELS[name]()
    converted = convert(model, norm)
    kept, original = list(converted.state_dict()), list(model.state_dict())
    if norm in ("gn", "gkn"):
        original = [key for key in original if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert [key for key in kept if key in set(original)] == original
    own = {key.rpartition(".")[2] for key in kept if key not in set(original)}
    assert own == ({"gain_logit", "noise_raw"} if norm in ("bkn", "gkn") else set())
    assert [n for n, _ in converted.named_parameters() if n in set(original)] == [
        n for n, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("norm", ["bn", "bkn", "gn", "gkn"])
def test_settings_and_values_are_kept(norm: str) -> None:
    model = trained(Residual())
    model.bn1.weight.requires_grad_(False)
    converted = convert(model, norm)
    for name, old in model.named_modules():
        if not isinstance(old, _BatchNorm):
            continue
        new = converted.get_submodule(name)
        assert type(new) is type(NORMS[norm](8))
        assert new.eps == old.eps and torch.equal(new.weight, old.weight) and torch.equal(new.bias, old.bias)
        assert new.weight.requires_grad == old.weight.requires_grad and new.bias.requires_grad
        if norm in ("bn", "bkn"):
            assert new.momentum == old.momentum and new.num_batches_tracked == 2
            assert torch.equal(new.running_mean, old.running_mean) and torch.equal(new.running_var, old.running_var)
    assert converted.get_submodule("bn").eps == 1e-4
    assert torch.equal(converted.conv.weight, model.conv.weight)


@pytest.mark.parametrize("name", quick(MODELS, *FEW))
def test_bn_of_the_whole_batch_is_the_original_bit_for_bit(name: str) -> None:
    """In training and evaluation, gradients and moving values included, whichever mode it was converted in."""
    model, x = MODELS[name](), images(2, 32 if name in ("resnet18", "resnet50", "resnet101") else 8)
    copies = []
    for training in (True, False):
        copies.append(convert(model.train(training), "bn"))
        assert copies[-1].training is training
    networks = [model, *copies]
    for training in (True, False):
        outputs, gradients = [], []
        for network in networks:
            torch.manual_seed(1)  # dropout
            out = network.train(training)(x)
            outputs.append(out if isinstance(out, tuple) else (out,))
            if training:
                gradients.append(torch.autograd.grad(loss_of(out), list(network.parameters())))
        for of_copy in (*outputs[1:], *gradients[1:]):
            original = outputs[0] if len(of_copy) == len(outputs[0]) else gradients[0]
            assert all(torch.equal(a, b) for a, b in zip(of_copy, original, strict=True))
    assert all(equal_states(model, twin) for twin in copies)


def test_modes_differ_as_the_originals_do() -> None:
    for mode in (True, False):
        converted = convert(Moody().train(mode), "bkn", stat_batch=2)
        x = images()
        assert isinstance(converted.train()(x), tuple)
        assert not torch.equal(converted(x)[0], converted(x)[0])  # dropout
        converted.eval()
        assert torch.is_tensor(converted(x)) and torch.equal(converted(x), converted(x))
        assert "aux_bn" in belief_report(converted, x)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_modes_of_submodules_are_kept(again: bool) -> None:
    """A frozen BatchNorm stays frozen, and the original is left as it was."""
    model = Residual().train()
    model.bn1.eval(), model.shortcut.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    converted = convert(model, "bkn", stat_batch=2)
    if again:
        converted = convert(converted, "bn")
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: m.training for name, m in converted.named_modules()} == modes


def test_modes_of_submodules_are_kept_by_fold() -> None:
    model = Residual().train()
    model.bn1.eval()
    folded = fold(convert(model, "bkn", stat_batch=2))
    assert {name: m.training for name, m in folded.named_modules()} == {n: m.training for n, m in model.named_modules()}


def test_code_is_readable() -> None:
    """Of generated forwards, in tracebacks and in the debugger."""
    forward = type(convert(Residual(), "bkn", stat_batch=2)).forward
    source = linecache.getlines(forward.__code__.co_filename)
    for line in (
        "    bn1_and_belief = call(bn1_module, (conv1_y,), {}, (conv1_belief,), {})",
        "    bn1_y = bn1_and_belief[0]",
        "    bn1_belief = bn1_and_belief[1]",
    ):
        assert any(written.startswith(line) for written in source), source


def test_layers_without_a_trace_of_their_own() -> None:
    """affine=False, track_running_stats=False: the same keys, and the same outputs in both modes."""
    for options in ({"affine": False}, {"track_running_stats": False}):
        model = nn.Sequential(conv3x3(3, 4), nn.BatchNorm2d(4, **options))
        converted = convert(model, "bn")
        for network in (model, converted, fold(converted)):
            network.train()
        x = images()
        assert torch.equal(converted(x), model(x))
        model.eval(), converted.eval()
        x = images()
        assert torch.equal(converted(x), model(x))
        assert set(model.state_dict()) <= set(converted.state_dict())
        assert not any(
            p.requires_grad for n, p in converted.named_parameters() if n not in dict(model.named_parameters())
        )
        folded = fold(converted)
        assert list(folded.state_dict()) == list(model.state_dict()) and torch.equal(folded(x), model(x))


def test_models_with_two_dimensional_inputs() -> None:
    model = trained_perceptron()
    converted = convert(model, "bn")
    x = torch.randn(8, 3)
    assert torch.equal(converted(x), model(x))
    folded = fold(convert(model, "bkn", stat_batch=2).eval())
    assert type(folded.bn1) is nn.BatchNorm1d
    torch.testing.assert_close(folded(x), model.eval()(x))


def trained_perceptron() -> nn.Module:
    model = Perceptron().train()
    model(torch.randn(8, 3) + 1)
    return model


def test_a_normalizer_with_two_names_is_converted() -> None:
    """Shared layers, under whichever name they are called."""
    model = Chain(lambda self, x: F.relu(self.again(x)))
    model.again = model.bn1
    converted = convert(model, "bkn", stat_batch=2)
    assert converted.again is converted.bn1
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    reference = convert(copy.deepcopy(model), "bn")
    x = images()
    assert torch.equal(reference(x), model(x))


class Named(nn.Module):
    """Names that a wrapper could use itself; constants that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.code = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.report, self.name = conv3x3(4, 4), nn.BatchNorm2d(4)
        self.scale = torch.tensor(0.5)
        self.register_buffer("input_mean", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.code(self.source((x - self.input_mean) * self.scale)))
        return self.name(self.report(x * torch.tensor([2.0])))


class Centred(nn.Module):
    """A buffer by the name of one of convert's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.register_buffer("input_mean", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x - self.input_mean))


def test_names_and_constants_of_the_users_own() -> None:
    model = Named()
    converted = convert(model, "bn")
    x = images()
    assert torch.equal(converted(x), model(x))
    assert torch.equal(fold(converted).eval()(x), model.eval()(x))


def test_buffers_by_the_name_of_the_input_belief() -> None:
    model = Centred()
    x = images()
    assert torch.equal(fold(convert(model, "bn"))(x), model(x))
    converted = convert(model, "bkn", input_belief=(torch.zeros(3), torch.ones(3)))
    folded = fold(converted.eval())
    assert equal_states(folded, model)
    torch.testing.assert_close(folded(x), model.eval()(x))


# --- a model that was converted before ---


def test_converting_a_converted_model() -> None:
    first = trained(convert(Residual(), "bkn", preset="paper", **SAMPLING))
    bn = convert(first, "bn", stat_batch=2)
    assert isinstance(bn, Residual) and bn.training and list(bn.state_dict()) == list(Residual().state_dict())
    assert equal_states(bn, fold(first)) and not belief_report(bn)
    again = convert(bn, "bkn", stat_batch=2)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in bn.state_dict().items())
    assert belief_report(again, images())["bn1"] is None
    assert again.get_submodule("bn").momentum == 0.3 and again.get_submodule("bn").eps == 1e-4


@pytest.mark.parametrize("norm", ["gn", "gkn"])
def test_fold_and_conversion_of_what_has_no_moving_statistics(norm: str) -> None:
    converted = convert(Residual(), norm)
    with pytest.raises(ValueError, match=r"bn1? .*no moving statistics"):
        fold(converted)
    with pytest.raises(ValueError, match="no moving statistics"):
        convert(converted, "bn")


@pytest.mark.parametrize("norm", ["bn", "bkn", "pn"])
def test_affine_parameters_that_the_original_has_not(norm: str) -> None:
    """Asked for, they are learned, and fold keeps them."""
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    model, x = convert(original, norm, stat_batch=2, affine=True), images()
    model(x).square().sum().backward()
    with torch.no_grad():
        model[1].weight -= 0.1 * model[1].weight.grad
    torch.testing.assert_close(fold(model.eval())(x), model(x))
    assert not list(convert(original, "bn")[1].parameters())


def test_noise_is_shared_where_a_mapping_says_so() -> None:
    shared = ("bkn", {"noise": "shared"})
    model = convert(Residual(), {"bn": "bkn", "bn1": shared, "bn2": shared, "*": "bn"})
    assert model.bn1.noise_raw is model.bn2.noise_raw is not model.bn.noise_raw


# --- errors ---


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("bnk", {}, "unknown normalizer 'bnk'; .*bkn"),
        ("bkn", {"preset": "papper"}, "unknown preset 'papper'; .*paper, eq7, robust, released"),
        ("bkn", {"predictor": "exact"}, "'closed' or 'sampling', not 'exact'"),
        ("bkn", {"gian": 0.3}, "'bkn'.*gian"),
        ("gn", {"gian": 0.3}, "'gn'.*gian"),
        ("bn", {"gain": 0.3}, "'bn'.*gain"),
        ("bkn", {"gain": 1.0}, "bn: gain 1 cannot be learned"),
        ("gkn", {"num_groups": 5}, "bn: 5 groups do not divide 8 channels"),
        ("gn", {"num_groups": 3}, "bn: 3 groups do not divide 8 channels"),
        ("bkn", {"leaves": ["Conv2d"]}, "leaves must be classes of modules, not 'Conv2d'"),
        ("bkn", {"stat_batch": 0}, "stat_batch must be a whole number of at least 1, or None, not 0"),
        ("ibn", {"ratio": 1.0, "gain": 0.3}, "'ibn'.*gain"),
        ("bkn", {"preset": "released", "stat_batch": 4}, r"statistics batch 2 \(0\.1\) and 128 \(0\.95\) only, not 4"),
    ],
)
def test_bad_arguments(norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(Residual(), norm, **options)


def test_released_preset() -> None:
    for stat_batch, gain in ((2, 0.1), (128, 0.95)):
        layer = convert(Residual(), "bkn", preset="released", stat_batch=stat_batch).bn1
        assert layer.gain == gain and layer.noise_raw is None and layer.guard == 100 and layer.mixture
        assert layer.moving_groups == "first" and layer.first_unbiased
    over = convert(Residual(), "bkn", preset="released", stat_batch=4, gain=0.3, mixture=False).bn1
    assert over.gain == 0.3 and not over.mixture and over.guard == 100
    model = convert(Residual(), "bkn", preset="released", stat_batch=2)
    assert "conv1_noise._extra_state" in model.state_dict()
    closed = convert(Residual(), "bkn", preset="released", stat_batch=2, predictor="closed")
    assert "conv1_noise._extra_state" not in closed.state_dict()
    paper = convert(Residual(), "bkn", stat_batch=2).bn1
    assert paper.gain_logit is not None and paper.noise_raw is not None and paper.guard is None and paper.mixture
    assert not convert(Residual(), "bkn", preset="eq7", stat_batch=2).bn1.mixture


def test_models_that_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="Linear has no BatchNorm layer"):
        convert(nn.Linear(2, 2), "bkn")
    for function in (fold, belief_report):
        with pytest.raises(ValueError, match="Residual is not a converted model"):
            function(Residual())


def branches_on_values(self: Chain, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x  # the line that is to be named


def test_untraceable_models_run_as_they_are() -> None:
    """With beliefs all the same; which they are, and why, is said."""
    model = Chain(branches_on_values).eval()
    converted = convert(model, "bkn", stat_batch=2)
    assert not any(m.training for m in converted.modules())
    assert list(untraced(converted)) == [""] and "control flow" in untraced(converted)[""]
    assert not untraced(convert(Residual(), "bkn"))
    assert belief_report(converted, images()) == {"bn1": NOTHING, "bn2": None}
    assert torch.equal(convert(model, "bn")(x := images()), model(x))


def test_errors_of_a_converted_network_name_the_layer() -> None:
    model = convert(Residual(), "bkn", stat_batch=1)
    with pytest.raises(ValueError, match=r"^bn1: statistics of a single value"):
        model(images(2, 2))  # 1 x 1 behind the strided convolution
    model = convert(Residual(), "bkn", stat_batch=4)
    with pytest.raises(ValueError, match=r"^bn: a batch of 6 images"):
        model(images(6))


def test_a_frozen_network_stays_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net.requires_grad_(False)
    net[4].bias.requires_grad_()
    for norm in ("bkn", "gkn", "sn"):
        model = convert(net, norm)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["4.bias"]


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_parameters_that_are_shared_stay_shared(norm: str) -> None:
    """By layers, and by what penalizes them (network slimming)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net[4].weight = net[1].weight
    net.slimmed = nn.ParameterList([net[1].bias])
    model = convert(net, norm)
    folded = fold(model) if norm != "gkn" else model
    for copied in (model, folded):
        assert copied[1].weight is copied[4].weight and copied[1].bias is copied.slimmed[0]
    own = [{id(p) for p in one.parameters()} for one in ((net, model, folded) if norm != "gkn" else (net, model))]
    assert len(set().union(*own)) == sum(map(len, own))


def test_a_forward_that_calls_the_original_is_refused() -> None:
    """In silence the copy was the original: its layers were used, and trained."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model, inner = convert(net, "bkn", stat_batch=2), net.forward
    net.forward = lambda x: inner(2 * x)
    for name, whole in (("the model", net), ("0", nn.Sequential(net))):
        with pytest.raises(ValueError, match=rf"{name} \(Sequential\): its forward is a function that calls the model"):
            convert(whole, "bkn")
    model.forward = lambda x: type(model).forward(model, 2 * x)
    with pytest.raises(ValueError, match="its forward is a function that calls the model"):
        fold(model)
    net.forward = MethodType(lambda self, x: nn.Sequential.forward(self, 2 * x), net)
    model = convert(net, "bkn", stat_batch=2)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and net[0].weight.grad is None


def test_a_normalizer_that_is_called_twice_has_a_prior_if_both_calls_have() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.bn = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(torch.softmax(self.first(x), 1))
            return self.bn(self.conv(x))

    assert "softmax" in str(belief_report(convert(Twice(), "bkn"), torch.randn(4, 4, 8, 8))["bn"])
