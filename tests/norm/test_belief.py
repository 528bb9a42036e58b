"""The predict rules: closed forms against formulas, samples and finite differences; the sampling predictor's noise."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import error, leaves, random_belief
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kalmannorm import Belief
from kalmannorm.norm import moments as belief
from kalmannorm.norm.sampling import Noise, sampled_conv

D = torch.float64


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- linear operations ---


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_derivatives_of_a_convolutions_rule(groups: int) -> None:
    """They are written by hand, since the sums of taps are not kept."""
    mean, var, weight = leaves(*random_belief(3, 4, D), torch.randn(8, 4 // groups, 3, 3, dtype=D))

    def rule(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(belief.conv(Belief(*inputs[:2]), inputs[2], groups=groups))

    assert gradcheck(rule, (mean, var, weight)) and gradgradcheck(rule, (mean, var, weight))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 1, 4)])
def test_conv_is_the_interior_of_a_constant_map(stride: int, dilation: int, groups: int, bias: bool) -> None:
    """mean' = W applied to a map of means, var' = W^2 applied to a map of variances, away from the border."""
    b = random_belief(3, 4, D)
    weight, shift = torch.randn(8, 4 // groups, 3, 3, dtype=D), torch.randn(8, dtype=D) if bias else None
    out = belief.conv(b, weight, shift, groups)

    def valid(rows: Tensor, kernel: Tensor, shift: Tensor | None) -> Tensor:
        image = rows[:, :, None, None].expand(-1, -1, 7, 7)
        return F.conv2d(image, kernel, shift, stride, 0, dilation, groups)[:, :, 0, 0]

    assert error(out.mean, valid(b.mean, weight, shift)) < 1e-13
    assert error(out.var, valid(b.var, weight.square(), None)) < 1e-13


CONVOLUTIONS = [F.linear, F.conv1d, F.conv2d, F.conv3d]


@pytest.mark.parametrize(
    ("axes", "how"),
    [(0, {}), (1, {"stride": 2}), (2, {"groups": 2}), (2, {"stride": 2, "dilation": 2, "groups": 2}), (3, {})],
    ids=str,
)
def test_covariance_behind_a_convolution_is_that_of_samples(axes: int, how: dict[str, int]) -> None:
    """Of inputs whose channels are correlated and whose pixels are not; its diagonal is the variance's rule."""
    groups, samples = how.get("groups", 1), 40_000
    c_in, c_out, size = 4 // groups, 6 // groups, (3, 2, 3)[:axes]
    weight = torch.randn(6, c_in, *size, dtype=D)
    root = torch.randn(groups, c_in, c_in, dtype=D)
    # Maps of one output pixel each, at strides and dilations too: those of different images are independent.
    pixels = [how.get("dilation", 1) * (n - 1) + 1 for n in size]
    x = torch.einsum("gij,ngj...->ngi...", root, torch.randn(samples, groups, c_in, *pixels, dtype=D)).flatten(1, 2)
    y = CONVOLUTIONS[axes](x, weight, **how).flatten(1).view(samples, groups, c_out)
    found = belief.conv_covariance(root @ root.mT, weight, groups)
    for group, predicted in enumerate(found):
        var = predicted.diagonal()
        # A covariance's standard error is sqrt((S_ij^2 + S_ii S_jj) / samples).
        tolerance = 5 * ((predicted.square() + var[:, None] * var) / samples).sqrt()
        assert ((torch.cov(y[:, group].T) - predicted).abs() < tolerance).all()
    b = random_belief(1, 4, D)
    rule = belief.conv(b, weight, groups=groups) if axes else belief.linear(b, weight)
    of_diagonal = belief.conv_covariance(b.var.view(groups, -1).diag_embed(), weight, groups)
    assert error(of_diagonal.diagonal(dim1=-2, dim2=-1).reshape(1, -1), rule.var) < 1e-13


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    b = random_belief(3, 4, D)
    weight, shift = torch.randn(5, 4, dtype=D), torch.randn(5, dtype=D) if bias else torch.zeros(5, dtype=D)
    out = belief.linear(b, weight, shift if bias else None)
    assert error(out.mean, b.mean @ weight.T + shift) < 1e-13
    assert error(out.var, b.var @ weight.square().T) < 1e-13


def test_add_concat_pad() -> None:
    a, b, single = random_belief(3, 4), random_belief(3, 4), random_belief(1, 2)
    assert torch.equal(belief.add(a, b).mean, a.mean + b.mean) and torch.equal(belief.add(a, b).var, a.var + b.var)
    joined = belief.concat([a, single, b])  # a single row stands for every row
    assert torch.equal(joined.mean, torch.cat([a.mean, single.mean.repeat(3, 1), b.mean], 1))
    assert torch.equal(joined.var, torch.cat([a.var, single.var.repeat(3, 1), b.var], 1))
    padded = belief.pad_channels(a, 1, 2)  # per row, not as one flat vector of all rows
    for wide, narrow in zip(padded, a, strict=True):
        assert torch.equal(wide[:, 1:5], narrow) and not wide[:, 0].any() and not wide[:, 5:].any()


# --- ReLU ---


def rectified(mean: Tensor, var: Tensor) -> Belief:
    """E2 - E^2 straight from the textbook, in float64: accurate where |mean| is no more than some deviations."""
    mean, var = mean.double(), var.double()
    sd = var.sqrt()
    above, density = torch.special.ndtr(mean / sd), torch.exp(-0.5 * mean.square() / var) / math.sqrt(2 * math.pi)
    first, second = mean * above + sd * density, (mean.square() + var) * above + mean * sd * density
    return Belief(first, second - first.square())


@pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-13), (torch.float32, 1e-6)])
def test_relu_moments(dtype: torch.dtype, tolerance: float) -> None:
    sd = torch.logspace(-3, 3, 13, dtype=dtype)[:, None]
    mean = sd * torch.linspace(-6, 6, 121, dtype=dtype)
    b = Belief(mean, sd.square().expand_as(mean))
    out, exact = belief.relu(b), rectified(*b)
    assert ((out.mean - exact.mean) / sd).abs().max() < tolerance
    assert ((out.var - exact.var) / sd.square()).abs().max() < tolerance
    assert (out.mean >= 0).all() and (out.var >= 0).all()


def nearly(a: Tensor | None, b: Tensor) -> bool:
    """Equal, but for tails beyond 30 deviations (exp(-450) in float64, 0 in float32)."""
    assert a is not None and torch.isfinite(a).all()
    return torch.equal(torch.where(a.abs() < 1e-150, 0, a), b)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("far", [35.0, 1e4, 1e18])
def test_relu_far_from_zero(far: float, dtype: torch.dtype) -> None:
    """Many deviations above zero nothing changes, below nothing is left."""
    mean, var = leaves(torch.tensor([[far, -far]], dtype=dtype), torch.tensor([[1.0, 1.0]], dtype=dtype))
    out = belief.relu(Belief(mean, var))
    (out.mean.sum() + out.var.sum()).backward()
    kept = torch.tensor([[1.0, 0.0]], dtype=dtype)
    assert nearly(out.mean, mean.detach() * kept) and nearly(out.var, kept)
    assert nearly(mean.grad, kept) and nearly(var.grad, kept)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("var", [0.0, 1e-45, 1e-38])
def test_relu_at_zero_variance(var: float, dtype: torch.dtype) -> None:
    """A point, or next to one: max(mean, 0) and the variance kept or gone; every gradient finite."""
    mean, variance = leaves(
        torch.tensor([[-1e5, -2, 0, 3, 1e5]], dtype=dtype), torch.full((1, 5), var, dtype=torch.float64).to(dtype)
    )
    out = belief.relu(Belief(mean, variance))
    away = torch.tensor([0, 1, 3, 4])
    positive = (mean.detach()[:, away] > 0).to(dtype)
    assert nearly(out.mean[:, away], mean.detach()[:, away].clamp_min(0))
    assert nearly(out.var[:, away], variance.detach()[:, away] * positive)
    assert abs(out.mean[0, 2].item() - math.sqrt(variance[0, 2].item() / (2 * math.pi))) <= 1e-6 * math.sqrt(var)
    assert 0 <= out.var[0, 2].item() <= var
    (out.mean.sum() + out.var.sum()).backward()
    for grad in (mean.grad, variance.grad):
        assert grad is not None and torch.isfinite(grad).all()
        assert nearly(grad[:, away], positive)


def test_relu_is_the_moments_of_a_rectified_sample() -> None:
    b = Belief(torch.tensor([[-1.5, -0.2, 0.0, 0.7, 2.0]]), torch.tensor([[1.0, 0.3, 2.0, 0.5, 1.5]]))
    draws = F.relu(b.mean + b.var.sqrt() * torch.randn(1_000_000, 5))
    out = belief.relu(b)
    assert (out.mean - draws.mean(0)).abs().max() < 5e-3 and (out.var - draws.var(0)).abs().max() < 5e-3


def test_relu_second_derivatives_are_right_or_refused() -> None:
    """Never silently wrong: those who penalize gradients would not notice."""
    mean, var = leaves(torch.tensor([[0.3, -0.4]], dtype=D), torch.tensor([[0.7, 0.5]], dtype=D))

    def slope(mean: Tensor, var: Tensor) -> Tensor:
        first = torch.autograd.grad(belief.relu(Belief(mean, var)).mean.sum(), mean, create_graph=True)[0]
        return first.sum()

    step = 1e-5
    exact = (slope(mean + step, var) - slope(mean - step, var)) / (2 * step)
    try:
        (second,) = torch.autograd.grad(slope(mean, var), mean)
    except RuntimeError:
        return
    assert abs(second.sum().item() - exact.item()) < 1e-6


# --- gradients ---


def test_gradients_of_every_rule() -> None:
    """Finite differences in float64, at positive variance."""
    a, b = (leaves(*random_belief(2, 4, D)) for _ in range(2))
    kernel, matrix, shift = leaves(
        torch.randn(6, 2, 3, 3, dtype=D), torch.randn(3, 4, dtype=D), torch.randn(6, dtype=D)
    )
    noise = torch.randn(2, 4, 5, 5, dtype=D)
    strided = ((2, 2), (1, 1), (1, 1), 2)
    assert gradcheck(lambda m, v, w, s: tuple(belief.conv(Belief(m, v), w, s, 2)), (*a, kernel, shift))
    assert gradcheck(lambda m, v, w: tuple(belief.linear(Belief(m, v), w, None)), (*a, matrix))
    assert gradcheck(lambda m, v: tuple(belief.relu(Belief(m, v))), (*a,))
    assert gradcheck(lambda m, v, n, u: tuple(belief.add(Belief(m, v), Belief(n, u))), (*a, *b))
    assert gradcheck(lambda m, v, n, u: tuple(belief.concat([Belief(m, v), Belief(n, u)])), (*a, *b))
    assert gradcheck(lambda m, v: tuple(belief.pad_channels(Belief(m, v), 1, 2)), (*a,))
    for rectify in (False, True):
        assert gradcheck(
            lambda m, v, w, s, r=rectify: tuple(sampled_conv(Belief(m, v), noise, w, s, *strided, relu=r)),
            (*a, kernel, shift),
        )


# --- sampling ---


def test_sampled_conv_by_hand() -> None:
    """Mean + sd * noise, rectified, convolved with the layer's own stride, padding, dilation and groups."""
    b, noise = random_belief(3, 4), torch.randn(3, 4, 6, 6)
    weight, shift = torch.randn(8, 2, 3, 3), torch.randn(8)
    out = sampled_conv(b, noise, weight, shift, (2, 1), (1, 2), (1, 2), 2, relu=True)
    image = F.relu(b.mean[:, :, None, None] + b.var.sqrt()[:, :, None, None] * noise)
    pixels = F.conv2d(image, weight, shift, (2, 1), (1, 2), (1, 2), 2).flatten(2)
    assert error(out.mean, pixels.mean(2)) < 1e-5 and error(out.var, pixels.var(2, correction=0)) < 1e-5


@pytest.mark.parametrize("relu", [False, True])
def test_sampled_conv_at_zero_variance(relu: bool) -> None:
    """A constant channel is constant: no eps under the root, gradient 0 for its variance, nothing infinite."""
    mean, var = leaves(torch.tensor([[1.5, -0.5]], dtype=D), torch.zeros(1, 2, dtype=D))
    weight = torch.randn(3, 2, 1, 1, dtype=D)
    out = sampled_conv(Belief(mean, var), torch.randn(1, 2, 4, 4, dtype=D), weight, relu=relu)
    constant = F.relu(mean) if relu else mean
    assert error(out.mean.detach(), (constant @ weight.flatten(1).T).detach()) < 1e-14
    assert out.var.abs().max() < 1e-28
    (out.mean.sum() + out.var.sum()).backward()
    assert mean.grad is not None and torch.isfinite(mean.grad).all() and mean.grad.any()
    assert var.grad is not None and not var.grad.any()


@pytest.mark.parametrize("var", [0.0, 1e-38])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_chain_of_rules_at_zero_variance_has_finite_gradients(dtype: torch.dtype, var: float) -> None:
    mean, variance = leaves(torch.tensor([[-1.0, 0.0, 2.0]], dtype=dtype), torch.full((1, 3), var, dtype=dtype))
    weight, noise = torch.randn(3, 3, 3, 3, dtype=dtype), torch.randn(1, 3, 4, 4, dtype=dtype)
    b = belief.relu(belief.conv(belief.relu(Belief(mean, variance)), weight))
    b = sampled_conv(belief.add(b, b), noise, weight, padding=(1, 1), relu=True)
    (b.mean.sum() + b.var.sum()).backward()
    assert mean.grad is not None and torch.isfinite(mean.grad).all()
    assert variance.grad is not None and torch.isfinite(variance.grad).all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_closed_form_is_the_expectation_of_sampling_on_a_large_unpadded_map(kernel: int, relu: bool) -> None:
    b, rows = random_belief(1, 4), 256
    weight, shift = torch.randn(5, 4, kernel, kernel), torch.randn(5)
    many = Belief(b.mean.expand(rows, -1), b.var.expand(rows, -1))
    drawn = sampled_conv(many, torch.randn(rows, 4, 48, 48), weight, shift, relu=relu)
    closed = belief.conv(belief.relu(b) if relu else b, weight, shift)
    for found, expected in zip(drawn, closed, strict=True):
        spread = found.std(0) / math.sqrt(rows)
        finite_map = 0.02 * expected if expected is closed.var else 0  # 48 x 48 pixels are not infinitely many
        assert ((found.mean(0) - expected).abs() <= 4 * spread + finite_map).all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("size", "stride", "expected_share"), [(8, 1, None), (5, 2, None), (1, 1, 0.0)])
def test_sampling_on_finite_maps(size: int, stride: int, expected_share: float | None, relu: bool) -> None:
    """E[sampled var] = mean over pixels of Var(y) + variance over pixels of E(y) - Var(mean over pixels of y)."""
    rows = 8192
    b = random_belief(1, 2, D)
    weight = torch.randn(3, 2, 3, 3, dtype=D)
    many = Belief(b.mean.expand(rows, -1), b.var.expand(rows, -1))
    drawn = sampled_conv(
        many, torch.randn(rows, 2, size, size, dtype=D), weight, None, (stride, stride), (1, 1), relu=relu
    )
    pixel = belief.relu(b) if relu else b

    def padded(rows: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(rows.view(1, 2, 1, 1).expand(1, 2, size, size), kernel, None, stride, 1)[0]

    mean_map, var_map = padded(pixel.mean, weight), padded(pixel.var, weight.square())
    image = torch.zeros(1, 2, size, size, dtype=D)
    influence = torch.autograd.functional.jacobian(
        lambda i: F.conv2d(i, weight, None, stride, 1).mean((0, 2, 3)), image
    )
    var_of_mean = (influence[:, 0].square() * pixel.var.view(1, 2, 1, 1)).sum((1, 2, 3))
    expected = var_map.mean((1, 2)) + mean_map.var((1, 2), correction=0) - var_of_mean
    spread = 5 / math.sqrt(rows)
    assert ((drawn.mean.mean(0) - mean_map.mean((1, 2))).abs() <= spread * drawn.mean.std(0)).all()
    assert ((drawn.var.mean(0) - expected).abs() <= spread * drawn.var.std(0) + 1e-12).all()
    if expected_share is not None:  # a single pixel varies over nothing
        assert not drawn.var.any() and expected.abs().max() < 1e-12


# --- noise ---


def draw(noise: Noise, rows: int = 4, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    b = Belief(torch.zeros(rows, channels, dtype=dtype), torch.ones(rows, channels, dtype=dtype))
    return noise(b, torch.zeros(2, channels, 5, 7))


def test_noise_has_the_input_size_and_is_standard_normal() -> None:
    drawn = draw(Noise(0), rows=64, channels=32)
    assert drawn.shape == (64, 32, 5, 7) and drawn.dtype == torch.float32
    assert abs(drawn.mean().item()) < 0.01 and abs(drawn.std().item() - 1) < 0.01
    assert draw(Noise(0), dtype=D).dtype == D


@pytest.mark.parametrize("world", [1, 2, 4])
def test_noise_does_not_depend_on_the_number_of_devices(world: int) -> None:
    """Interleaved groups: device r of k holds groups r, r + k, ..."""
    whole, shards = Noise(3), [Noise(3) for _ in range(world)]
    for rank, shard in enumerate(shards):
        shard.shard = (rank, world)
    for _ in range(2):  # two steps
        together = torch.stack([draw(shard, rows=4 // world) for shard in shards], 1).flatten(0, 1)
        assert torch.equal(together, draw(whole))


def test_noise_is_keyed_by_seed_layer_and_step() -> None:
    noise = Noise(1, seed=5)
    first, second = draw(noise), draw(noise)
    assert noise.step == 2 and not torch.equal(first, second)
    assert not torch.equal(first, draw(Noise(2, seed=5))) and not torch.equal(first, draw(Noise(1, seed=6)))
    torch.manual_seed(99)  # the global generator has no part in it, and is left alone
    assert torch.equal(first, draw(Noise(1, seed=5)))
    state = torch.get_rng_state()
    draw(noise)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_goes_on_from_the_state_dict() -> None:
    noise, fresh = Noise(1), Noise(1)
    draw(noise)
    fresh.load_state_dict(noise.state_dict())
    assert fresh.step == 1 and torch.equal(draw(fresh), draw(noise))


def test_noise_in_evaluation_is_fixed() -> None:
    noise = Noise(1)
    draw(noise)
    noise.eval()
    once, twice = draw(noise), draw(noise)
    assert torch.equal(once, twice) and noise.step == 1
    assert torch.equal(once, draw(Noise(1).eval()))


# --- autocast ---


def test_rules_keep_float32_under_autocast() -> None:
    b, weight, matrix = random_belief(2, 4), torch.randn(4, 4, 3, 3), torch.randn(4, 4)
    noise = torch.randn(2, 4, 5, 5)

    def everything() -> list[Belief]:
        return [
            belief.conv(b, weight),
            belief.conv(b, torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)), None, 2),
            belief.linear(b, matrix),
            belief.relu(b),
            belief.add(b, b),
            belief.concat([b, b]),
            sampled_conv(b, noise, weight, relu=True),
        ]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    for a, c in zip(plain, cast, strict=True):
        assert torch.equal(a.mean, c.mean) and torch.equal(a.var, c.var)
    half = belief.conv(b, weight.bfloat16())
    assert half.mean.dtype == half.var.dtype == torch.float32
