"""A normalizer per layer, and the placements that have names, against public code's (tests/golden/talk)."""

import json

import pytest
import torch
import torchvision
from helpers import TABLE_2, TALK, Residual, error, quick, talk_golden
from torch import nn
from torchvision.models.resnet import Bottleneck

from kalmannorm import convert, fold, set_progress
from kalmannorm.conversion.mapping import assign
from kalmannorm.conversion.mapping import choices as normalizers
from kalmannorm.models import ARCHS, LAST_NORMALIZERS
from kalmannorm.norm import BatchNorm, GroupNorm, InstanceBatchNorm, KalmanBatchNorm2d, SparseSwitchableNorm
from kalmannorm.placement import PLACEMENTS, choices, ibn_a, ibn_b, itern_first, zca_first

PLACED = json.loads((TALK / "ibn_placement.json").read_text())


def test_the_first_pattern_that_matches_counts():
    layers = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer4.0.bn1"]
    mapping = {"layer[1-3].*.bn1": ("ibn", {"ratio": 0.4}), "layer*": "gn", "*": "bn"}
    found = assign(normalizers(mapping, {}), layers)
    expected = [("bn", {}), ("ibn", {"ratio": 0.4}), ("gn", {}), ("gn", {})]
    assert found == dict(zip(layers, expected, strict=True))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"bn1": "bn", "layer9.*": "in", "*": "bn"}, r"pattern 'layer9\.\*' matches no normalizer's name"),
        ({"*": "bn", "bn1": "in"}, "pattern 'bn1' matches no"),
        ({"bn1": "in"}, "no pattern for the normalizer bn: add"),
        ({"bn1": "gkn", "*": "bkn"}, "bkn and gkn in one mapping"),
        ({"*": "bm"}, r"\*: unknown normalizer 'bm'; valid: bn, "),
        ({"bn1": "wn", "*": "bn"}, "wn is for all layers"),
        ({"bn1": ("in", {"ratio": 1}), "*": "bn"}, "'in'.*ratio"),
        ({"bn1": ("bn", {"stat_batch": 4}), "*": "bn"}, "bn1: stat_batch is one for all layers"),
        ({"bn1": ("bn",), "*": "bn"}, r"bn1: must be a name of NORMS, or \(name, options\), not \('bn',\)"),
        (nn.GroupNorm, "norm must be a name of NORMS or a mapping of layer names to such, not <class"),
    ],
)
def test_bad_mappings_are_named(mapping, message):
    with pytest.raises(ValueError, match=message):
        convert(Residual(), mapping)


def test_presets_without_a_belief_are_refused():
    with pytest.raises(ValueError, match="preset is an option of bkn and gkn"):
        convert(Residual(), {"*": "bn"}, preset="talk")


def test_options_beside_a_mapping_are_refused():
    with pytest.raises(ValueError, match="ratio: options of normalizers stand in the mapping"):
        convert(Residual(), {"*": "ibn"}, ratio=0.5)


@pytest.mark.parametrize("norm", ["bn", "sn", "bkn"])
def test_all_of_one_kind_is_the_name_alone(norm):
    found = []
    for choice in (norm, {"*": norm}, {"bn1": norm, "*": (norm, {})}):
        torch.manual_seed(0)
        model = convert(Residual(), choice, stat_batch=2)
        x = torch.randn(4, 3, 8, 8)
        loss = model(x).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters()), *model.state_dict().values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_kinds_mix_and_fold_says_which_layer_cannot():
    torch.manual_seed(0)
    plain = Residual()
    model = convert(plain, {"bn1": "gn", "shortcut.1": "bkn", "*": "bn"}, stat_batch=2)
    kinds = {name: type(model.get_submodule(name)) for name in ("bn", "bn1", "bn2", "shortcut.1")}
    assert kinds == {"bn": BatchNorm, "bn1": GroupNorm, "bn2": BatchNorm, "shortcut.1": KalmanBatchNorm2d}
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    with pytest.raises(ValueError, match=r"bn1 \(GroupNorm\)"):
        fold(model)


NETWORKS = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "densenet121": torchvision.models.densenet121,
    "se_resnet101": ARCHS["se_resnet101"],
}


@pytest.mark.parametrize("name", quick(PLACED, "resnet50_ibn_a", "resnet50_ibn_b"))
def test_placement_is_public_code_s(name):
    network, _, placement = name.partition("_ibn_")
    expected = PLACED[name]
    plain = NETWORKS[network]()
    model = convert(plain, PLACEMENTS[f"ibn_{placement}"](plain), stat_batch=2)
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    layers = {key: m for key, m in model.named_modules() if isinstance(m, InstanceBatchNorm)}
    split = {key: [m.IN.weight.numel(), m.BN.weight.numel()] for key, m in layers.items()}
    assert split == expected["split"]
    instance = [
        key
        for key, m in model.named_modules()
        if isinstance(m, GroupNorm | nn.InstanceNorm2d) and key.rpartition(".")[0] not in layers
    ]
    assert sorted(instance) == sorted(expected["instance"])
    left = [m for key, m in model.named_modules() if isinstance(m, BatchNorm) and key.rpartition(".")[0] not in layers]
    assert len(left) == expected["batch_norms_left"]


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("densenet169", 14149480, 17),
        ("resnet34", 21797672, 13),
        pytest.param("resnext101_32x4d", 44177704, 30, marks=pytest.mark.slow),
        pytest.param("resnet152", 60192808, 47, marks=pytest.mark.slow),
        pytest.param("densenet201", 20013928, 22, marks=pytest.mark.slow),
        pytest.param("resnext50_32x4d", 25028904, 13, marks=pytest.mark.slow),
    ],
)
def test_placement_a_on_other_networks(name, parameters, layers):
    """The talk's and public code's: in ResNets every block of three stages, in DenseNets every third layer of three."""
    with torch.device("meta"):
        plain = (ARCHS.get(name) or getattr(torchvision.models, name))()
        model = convert(plain, ibn_a(plain))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, InstanceBatchNorm) for m in model.modules()) == layers


@pytest.mark.parametrize("name", quick(TABLE_2, "densenet121"))
def test_they_run_and_their_last_normalizers_are_named(name):
    torch.manual_seed(0)
    model = ARCHS[name](classes=10).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    (last,) = LAST_NORMALIZERS[name]
    assert last == [key for key, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)][-1]


def test_cifar_resnets_spare_the_last_stage():
    plain = ARCHS["resnet14"]()
    model = convert(plain, ibn_a(plain), stat_batch=2)
    layers = [name for name, m in model.named_modules() if isinstance(m, InstanceBatchNorm)]
    assert layers == [f"blocks.{i}.bn1" for i in range(4)]
    plain = ARCHS["resnet14"]()
    model = convert(plain, ibn_b(plain), stat_batch=2)
    assert isinstance(model.get_submodule("bn"), GroupNorm)
    added = [name for name, m in model.named_modules() if isinstance(m, nn.InstanceNorm2d)]
    assert added == ["blocks.1.IN"]
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    assert model.get_submodule("blocks.1.IN").weight.grad.any()
    plain = ARCHS["resnet14"]()
    assert itern_first(plain) == {"bn": "itern", "*": "bn"}
    assert zca_first(plain) == {"bn": "zca", "*": "bn"}


@pytest.mark.parametrize("place", [ibn_a, ibn_b])
def test_other_networks_are_refused(place):
    for name in ("resnet14_preact", "inception_cifar"):
        with pytest.raises(ValueError, match=f"placement {place.__name__} knows"):
            place(ARCHS[name]())


class Network(nn.Module):
    """One bottleneck with torchvision's parts, as the golden files have it."""

    def __init__(self):
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.block = Bottleneck(12, 4, downsample=shortcut)

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize("placement", ["a", "b"])
def test_a_bottleneck_is_public_code_s(placement):
    """Outputs, gradients and averages; the public names of its state dict load."""
    data = talk_golden(f"ibn_bottleneck_{placement}")
    plain = Network()
    if placement == "b":
        from kalmannorm.models.ibn import normalize_sum

        normalize_sum("block", plain.block)
    model = convert(plain, {"block.bn1": "ibn", "*": "bn"} if placement == "a" else "bn")
    state = {f"block.{key.removeprefix('p:')}": value for key, value in data.items() if key.startswith("p:")}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and not [
        key for key in missing.missing_keys if not key.split(".")[-1].startswith(("running", "num"))
    ]
    x = data["x"].clone().requires_grad_()
    y = model(x)
    y.backward(data["dy"])
    assert error(y.detach(), data["y"]) <= 1e-5 and error(x.grad, data["dx"]) <= 1e-5
    largest = max(value.abs().max() for key, value in data.items() if key.startswith("g:"))
    for key, value in data.items():
        if key.startswith("g:"):  # some are 0 but for rounding
            found = model.get_parameter(f"block.{key.removeprefix('g:')}").grad
            assert (found - value).abs().max() <= 1e-5 * max(value.abs().max(), 1e-2 * largest), key
        elif key.startswith("b:"):
            assert error(model.get_buffer(f"block.{key.removeprefix('b:')}"), value) <= 1e-5, key
    assert error(model.eval()(data["x"]).detach(), data["y_eval"]) <= 1e-5


def test_ssn_s_choices_become_plain_layers():
    torch.manual_seed(0)
    plain = Residual()
    model = convert(plain, "ssn", stat_batch=2)
    with pytest.raises(ValueError, match="bn has not chosen yet"):
        choices(model)
    chosen = {"bn": (0, 0), "bn1": (1, 1), "bn2": (2, 2), "shortcut.1": (0, 2)}
    for name, (mean, var) in chosen.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.mean_weight.copy_(torch.eye(3)[mean])
            layer.var_weight.copy_(torch.eye(3)[var])
    set_progress(model, 1.0)
    x = torch.randn(4, 3, 8, 8)
    y = model(x)
    mapping = choices(model)
    assert mapping == {"bn": "in", "bn1": "ln", "bn2": "bn", "shortcut.1": "ssn"}
    exported = convert(plain, mapping, stat_batch=2)
    exported.load_state_dict(model.state_dict(), strict=False)
    assert isinstance(exported.get_submodule("shortcut.1"), SparseSwitchableNorm)
    assert error(exported(x).detach(), y.detach()) < 1e-5
    exported.load_state_dict(model.state_dict(), strict=False)
    assert error(exported.eval()(x).detach(), model.eval()(x).detach()) < 1e-5
