"""No activation statistics: weight normalization with its initialization, no normalizer, frozen BN in networks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from contract import images
from helpers import Chain, Residual, error
from torch import Tensor, nn

from kalmannorm import convert, fold, initialize_weight_norm
from kalmannorm.norm.weight import is_weight_normalized
from kalmannorm.train.model import optimizer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("norm", ["wn", "none"])
def test_every_convolution_has_a_bias(norm: str) -> None:
    """Zero where it was added, kept where there was one; the network without its normalizers is what it was."""
    model = Residual()
    converted = convert(model, norm)
    for name, layer in convolutions(converted).items():
        own = model.get_submodule(name).bias
        assert layer.bias is not None and layer.bias.requires_grad
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias) if own is None else own)
        assert error(layer.weight.detach(), model.get_submodule(name).weight.detach()) < 1e-6
        assert is_weight_normalized(layer) is (norm == "wn")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    x = images(4, 3, 6, 6)
    assert error(converted(x).detach(), model(x).detach()) < 1e-5
    assert all(layer.bias is None for layer in convolutions(convert(torchvision.models.resnet18(), "bn")).values())


def reused(self: Chain, x: Tensor) -> Tensor:
    """A pre-activation block: the in-place ReLU must not reach the sum's other side."""
    return F.relu(self.bn1(x), inplace=True) + x


def test_an_in_place_relu_behind_no_normalizer_leaves_its_input_alone() -> None:
    model = Chain(reused)
    converted = convert(model, "none")
    x = model.conv1(images(4, 3, 7, 6))
    conv2 = model.conv2
    assert error(converted(images(4, 3, 7, 6)).detach(), conv2(F.relu(x) + x).detach()) < 1e-6


@pytest.mark.parametrize("norm", ["wn", "none", "sn", "ln", "in"])
def test_fold_says_what_cannot_be_folded(norm: str) -> None:
    model = convert(Residual(), norm)
    with pytest.raises(ValueError, match=r"bn \(\w+\) has no moving statistics to fold into a BatchNorm, or not those"):
        fold(model)
    with pytest.raises(ValueError, match="fold"):
        convert(model, "bn")


def test_initialization_standardizes_every_convolution_s_outputs() -> None:
    model = convert(Residual(), "wn")
    x, outputs = 3 * images(8, 3, 8, 8) + 1, {}
    directions = {name: layer.parametrizations.weight.original1.clone() for name, layer in convolutions(model).items()}
    initialize_weight_norm(model, x)
    for name, layer in convolutions(model).items():
        assert not layer._forward_hooks
        layer.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out.detach()}))
    model(x)
    assert outputs.keys() == directions.keys() and len(outputs) == 4
    for name, out in outputs.items():
        var, mean = torch.var_mean(out.double(), (0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-5 and (var - 1).abs().max() < 1e-3, name
        layer = model.get_submodule(name)
        assert torch.equal(layer.parametrizations.weight.original1, directions[name])


def test_initialization_of_shared_dead_and_other_layers() -> None:
    """A layer that runs twice is started by its first features, a channel without any keeps finite values, and nothing
    else is touched."""
    model = convert(Chain(lambda self, x: self.side(self.side(F.relu(x)))), "wn")
    with torch.no_grad():
        model.conv1.parametrizations.weight.original0[1] = 0
    x = images(4, 3, 9, 9)
    initialize_weight_norm(model, x)
    var, mean = torch.var_mean(model.side(F.relu(model.conv1(x))), (0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-5 and (var - 1).abs().max() < 1e-2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    plain = convert(Residual(), "bkn")
    before = copy.deepcopy(plain.state_dict())
    initialize_weight_norm(plain, torch.full((4, 3, 6, 6), torch.nan))
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_initialization_leaves_nothing_behind_when_it_fails() -> None:
    model = convert(Residual(), "wn")
    with pytest.raises(RuntimeError):
        initialize_weight_norm(model, torch.randn(4, 5, 6, 6))
    assert not any(layer._forward_hooks for layer in model.modules())


def test_weight_decay_takes_g() -> None:
    """|W|^2 = sum of g^2: the recipe's penalty, and the length of v, which changes nothing, is left alone."""
    model = convert(Residual(), "wn")
    decayed, rest = optimizer(model, momentum=0.9, weight_decay=0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"fc.weight"} | {
        f"{name}.parametrizations.weight.original0" for name in convolutions(model)
    }
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    g = model.conv1.parametrizations.weight.original0
    assert error(g.square().sum().detach(), model.conv1.weight.square().sum().detach()) < 1e-6


def test_copies_of_weight_normalized_networks() -> None:
    """By deepcopy and state_dict; torch refuses to pickle parametrizations, and says so."""
    model = convert(Residual(), "wn")
    initialize_weight_norm(model, images(8, 3, 6, 6))
    fresh = convert(Residual(), "wn")
    fresh.load_state_dict(model.state_dict())
    x = images(4, 3, 6, 6)
    for twin in (copy.deepcopy(model), fresh):
        assert torch.equal(twin(x), model(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)


def test_frozen_bn_keeps_a_model_s_constants() -> None:
    """The original's evaluation in both modes; back by fold and by another conversion, where gamma learns again."""
    model = Residual()
    for _ in range(3):
        model(images(4, 3, 6, 6) + 1)
    x = images(4, 3, 6, 6)
    expected = model.eval()(x).detach()
    frozen = convert(model, "frozen")
    assert all("bn" not in name for name, _ in frozen.named_parameters())
    assert list(frozen.state_dict()) == list(model.state_dict())
    for training in (True, False):
        assert torch.equal(frozen.train(training)(x), expected)
    assert error(fold(frozen).eval()(x).detach(), expected) < 1e-6
    assert type(fold(frozen).bn) is nn.BatchNorm2d and fold(frozen).bn.momentum == 0.3
    again = convert(frozen, "bkn").get_submodule("bn")
    assert again.weight.requires_grad and torch.equal(again.running_var, model.bn.running_var)
    fresh = convert(Residual(), "frozen")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
