"""IBN-Net's layer: its parts, any share and any number of channels, what convert hands each part."""

import pytest
import torch
from helpers import affine, error
from torch import nn

from kalmannorm import convert, fold
from kalmannorm.norm import BatchNorm, InstanceBatchNorm

D = torch.float64


@pytest.mark.parametrize("first", ["in", "bn"])
@pytest.mark.parametrize(("channels", "ratio"), [(6, 0.5), (7, 0.5), (7, 0.3), (5, 0.25), (6, 0.4), (1, 0.5)])
def test_no_channel_is_lost(channels, ratio, first):
    torch.manual_seed(0)
    layer = InstanceBatchNorm(channels, stat_batch=2, ratio=ratio, first=first).double()
    for part, of in layer.parts:
        affine(part, of.stop - of.start)
    ahead = int(channels * (ratio if first == "in" else 1 - ratio))
    instance, batch = (slice(0, ahead), slice(ahead, None)) if first == "in" else (slice(ahead, None), slice(0, ahead))
    x = torch.randn(4, channels, 3, 3, dtype=D) + 1
    y = layer(x).detach()
    assert y.shape == x.shape
    if layer.IN is not None:
        assert error(y[:, instance], layer.IN(x[:, instance]).detach()) < 1e-12
    if layer.BN is not None:
        alone = BatchNorm(layer.BN.num_features, stat_batch=2).double()
        alone.load_state_dict({**layer.BN.state_dict(), "running_mean": alone.running_mean * 0})
        assert error(y[:, batch], alone(x[:, batch]).detach()) < 1e-12


@pytest.mark.parametrize(("ratio", "norm"), [(0.0, "bn"), (1.0, "in")])
def test_all_of_one_part_is_that_normalizer(ratio, norm):
    torch.manual_seed(0)
    layer, x = InstanceBatchNorm(5, stat_batch=2, ratio=ratio), torch.randn(4, 5, 3, 3)
    plain = BatchNorm(5, stat_batch=2) if norm == "bn" else nn.InstanceNorm2d(5)
    expected = plain(x)
    assert error(layer(x).detach(), expected.detach()) < 1e-5
    assert len(layer.parts) == 1
    if norm == "in":
        assert torch.equal(layer.eval()(x), layer.train()(x))


def test_one_pixel_is_refused_by_name():
    layer = InstanceBatchNorm(4)
    layer.layer_name = "layer1.0.bn1"
    with pytest.raises(ValueError, match=r"layer1\.0\.bn1: statistics of a single value"):
        layer(torch.randn(4, 4, 1, 1))


def test_convert_hands_each_part_its_share():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    affine(plain[1], 6)
    plain[1].weight.requires_grad_(False)
    plain(torch.randn(4, 3, 6, 6))
    model = convert(plain, "ibn")
    layer = model.get_submodule("1")
    assert torch.equal(torch.cat([layer.IN.weight, layer.BN.weight]), plain[1].weight)
    assert torch.equal(torch.cat([layer.IN.bias, layer.BN.bias]), plain[1].bias)
    assert torch.equal(layer.BN.running_mean, plain[1].running_mean[3:])
    assert not layer.IN.weight.requires_grad and not layer.BN.weight.requires_grad and layer.IN.bias.requires_grad
    with pytest.raises(ValueError, match=r"1 \(InstanceBatchNorm\) has no moving statistics to fold"):
        fold(model)
