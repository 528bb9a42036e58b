"""Whitening: what comes out is white; gradients at equal eigenvalues; moving, precise and folded statistics."""

import pytest
import torch
from helpers import error
from torch import nn
from torch.autograd import gradcheck

from kalmannorm import NORMS, convert, fold, precise_statistics
from kalmannorm.norm import IterNorm, ZCANorm
from kalmannorm.norm.whitening import inverse_sqrt

D = torch.float64


def correlated(images=8, channels=6, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=D)
    x = torch.randn(images, channels, size, size, generator=generator, dtype=D)
    return torch.einsum("dc,nchw->ndhw", mix, x) + 3


def covariance(x):
    """[C, C] of all values of x [N, C, H, W]."""
    rows = x.transpose(0, 1).flatten(1)
    return torch.cov(rows, correction=0)


@pytest.mark.parametrize("norm", ["zca", "itern"])
def test_the_output_of_every_group_is_white(norm):
    # More iterations would spoil it again: Newton's method in this form lets rounding grow.
    options = {"iterations": 11} if norm == "itern" else {}
    layer, x = NORMS[norm](6, stat_batch=4, eps=1e-12, **options).double(), correlated()
    y = layer(x).detach()
    for group in range(2):
        assert error(covariance(y[group::2]), torch.eye(6, dtype=D)) < (1e-3 if norm == "itern" else 1e-8)


@pytest.mark.parametrize("norm", ["zca", "itern"])
@pytest.mark.parametrize("group", [4, 5])
def test_a_shorter_last_group_of_channels_is_as_by_itself(norm, group):
    layer, x = NORMS[norm](6, stat_batch=4, group=group).double(), correlated()
    y = layer(x)
    for channels in (slice(0, group), slice(group, 6)):
        alone = NORMS[norm](channels.stop - channels.start, stat_batch=4, group=group).double()
        assert error(y[:, channels].detach(), alone(x[:, channels]).detach()) < 1e-10


def test_zca_is_the_symmetric_root_and_not_pca():
    cov = covariance(correlated())
    root = inverse_sqrt(cov)
    assert error(root, root.T) < 1e-12 and error(root @ cov @ root, torch.eye(6, dtype=D)) < 1e-10


@pytest.mark.parametrize("values", [(1.0, 2.0, 5.0), (2.0, 2.0, 2.0), (3.0, 1.0, 1.0)], ids=str)
def test_gradient_of_the_root_where_eigenvalues_coincide(values):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=D)).Q
    matrix = (basis * torch.tensor(values, dtype=D)) @ basis.T
    assert gradcheck(lambda m: inverse_sqrt((m + m.T) / 2), matrix.requires_grad_())


def test_iterations_approach_the_root_from_a_constant():
    cov = covariance(correlated())
    errors = [error(IterNorm(6, iterations=n).double().whiten(cov), inverse_sqrt(cov)) for n in (0, 3, 6, 8, 10, 11)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    assert error(IterNorm(6, iterations=0).whiten(cov), torch.eye(6, dtype=D) / cov.trace().sqrt()) < 1e-12


def test_too_few_values_are_refused():
    layer = ZCANorm(6, stat_batch=2)
    layer.layer_name = "blocks.3.bn1"
    with pytest.raises(ValueError, match=r"blocks.3.bn1: 8 values \(statistics batch 2 on a feature map of 2x2\).* 6 "):
        layer(torch.randn(4, 6, 2, 2))
    assert layer.eval()(torch.randn(4, 6, 2, 2)).shape == (4, 6, 2, 2)  # by moving statistics


@pytest.mark.parametrize("norm", ["zca", "itern"])
@pytest.mark.parametrize("average", ["whitening", "cov"])
def test_moving_statistics_are_averages_of_w_or_of_the_covariance(norm, average):
    layer = NORMS[norm](6, stat_batch=4, average=average, eps=0.1).double()
    moving = torch.eye(6, dtype=D)
    for step in range(3):
        x = correlated(seed=step)
        layer(x)
        covs = torch.stack([covariance(x[g::2]) for g in range(2)])
        covs = covs + layer.eps * torch.eye(6, dtype=D)
        moving = 0.9 * moving + 0.1 * (covs if average == "cov" else layer.whiten(covs)).mean(0)
    assert error(layer.get_buffer(f"running_{average}")[0], moving) < 1e-10
    w = moving if average == "whitening" else layer.whiten(moving)
    x = correlated(seed=9)
    expected = torch.einsum("dc,nchw->ndhw", w, x - layer.running_mean.view(1, -1, 1, 1))
    assert error(layer.eval()(x).detach(), expected) < 1e-10


@pytest.mark.parametrize("norm", ["zca", "itern"])
@pytest.mark.parametrize("average", ["whitening", "cov"])
def test_precise_statistics_are_pooled(norm, average):
    layer = NORMS[norm](6, stat_batch=4, average=average, eps=0.1).double()
    batches = [correlated(seed=seed) * (seed + 1) for seed in range(3)]
    precise_statistics(layer, batches)
    together = torch.cat(batches)
    eye = layer.eps * torch.eye(6, dtype=D)
    assert error(layer.running_mean, together.mean((0, 2, 3))) < 1e-6
    assert error(layer.running_var, together.var((0, 2, 3), correction=0)) < 1e-6
    assert error(layer.moving_whitening()[0], layer.whiten(covariance(together) + eye)) < 1e-6


@pytest.mark.parametrize("group", [2, 5])
def test_folds_into_a_convolution(group):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    nn.init.normal_(plain[1].weight)
    nn.init.normal_(plain[1].bias)
    model = convert(plain, "zca", stat_batch=4, group=group)
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    folded = fold(model.eval())
    assert isinstance(folded[1], nn.Conv2d) and folded[1].groups == (3 if group == 2 else 1)
    x = torch.randn(4, 3, 8, 8)
    assert error(folded(x).detach(), model(x).detach()) < 1e-5


def test_whitens_in_float32_under_autocast():
    layer, exact = (ZCANorm(6, stat_batch=4) for _ in range(2))
    x = correlated().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    exact(x.float())
    assert error(layer.get_buffer("running_whitening"), exact.get_buffer("running_whitening")) < 1e-5


def test_parts_of_a_batch_compute_what_the_whole_does():
    """Exactly, at the default of five iterations; rounding is amplified by them (see test_distributed.py)."""
    layer = IterNorm(4, group=2, stat_batch=4).double()
    x = torch.randn(16, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    y = layer(x)
    (whole,) = torch.autograd.grad(y, x, upstream)
    for first in (0, 2):  # image i is of group i mod 4
        chosen = [i for i in range(16) if i % 4 in (first, first + 1)]
        part = x.detach()[chosen].requires_grad_()
        z = layer(part)
        torch.testing.assert_close(z, y[chosen], rtol=0, atol=1e-12)
        (of_part,) = torch.autograd.grad(z, part, upstream[chosen])
        torch.testing.assert_close(of_part, whole[chosen], rtol=0, atol=1e-12)
