"""The normalizers: the Kalman update against formulas and torch's own layers, groups, types, errors."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, FORMATS, D, affine, error, estimated, leaves, moving, random_belief, same
from torch import Tensor, nn

from kalmannorm import NORMS, Belief, KalmanBatchNorm2d, KalmanGroupNorm, convert, precise_statistics, set_statistics
from kalmannorm.norm import BatchNorm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def measurement_only(channels: int, **options: Any) -> KalmanBatchNorm2d:
    options = {"gain": 1, "learn_gain": False, "noise": False, "moving_unbiased": True, **options}
    return KalmanBatchNorm2d(channels, **options)


def step(layer: nn.Module, x: Tensor, dy: Tensor, prior: Belief | None = None) -> list[Tensor]:
    """Output and gradients of one forward and backward."""
    (x,) = leaves(x)
    layer.zero_grad()
    y = layer(x) if prior is None else estimated(layer, x, prior)[0]
    y.backward(dy)
    return [y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]  # type: ignore[union-attr, list-item]


# --- gain 1: the estimator gives back the normalizer it is built on ---


@FORMATS
@DTYPES
@pytest.mark.parametrize("with_prior", [False, True])
def test_gain_1_is_batch_norm(
    dtype: torch.dtype, tolerance: float, with_prior: bool, memory_format: torch.memory_format
) -> None:
    ours, torchs = measurement_only(5, eps=1e-4, momentum=0.3).to(dtype), nn.BatchNorm2d(5, 1e-4, 0.3).to(dtype)
    for layer in (ours, torchs):
        affine(layer, 5)
    prior = (random_belief(1, 5, dtype),) if with_prior else ()
    for _ in range(3):
        x = (2 * torch.randn(6, 5, 4, 3, dtype=dtype) + 3).contiguous(memory_format=memory_format)
        dy = torch.randn(6, 5, 4, 3, dtype=dtype)
        same(step(ours, x, dy, *prior), step(torchs, x, dy), tolerance)
    same(moving(ours), moving(torchs), tolerance)
    assert ours.num_batches_tracked == torchs.num_batches_tracked
    ours.eval(), torchs.eval()
    assert error(ours(x).detach(), torchs(x).detach()) <= tolerance


@FORMATS
@DTYPES
@pytest.mark.parametrize("build", [BatchNorm, measurement_only], ids=["bn", "kn"])
@pytest.mark.parametrize("stat_batch", [1, 2, 4])
def test_groups_are_batch_norms_of_their_own(
    stat_batch: int,
    build: Callable[..., nn.Module],
    dtype: torch.dtype,
    tolerance: float,
    memory_format: torch.memory_format,
) -> None:
    """Interleaved: image i of G groups belongs to group i mod G. Gradients add up, moving values are their mean."""
    groups = 8 // stat_batch
    ours = build(5, stat_batch=stat_batch).to(dtype)
    parts = [nn.BatchNorm2d(5).to(dtype) for _ in range(groups)]
    for layer in (ours, *parts):
        affine(layer, 5)
    for _ in range(2):
        x = (2 * torch.randn(8, 5, 4, 3, dtype=dtype) + 3).contiguous(memory_format=memory_format)
        dy = torch.randn(8, 5, 4, 3, dtype=dtype)
        y, dx, dgamma, dbeta = step(ours, x, dy)
        expected = [step(part, x[g::groups], dy[g::groups]) for g, part in enumerate(parts)]
        for g in range(groups):
            same([y[g::groups], dx[g::groups]], expected[g][:2], tolerance)
        sums = [sum(e[i] for e in expected) for i in (2, 3)]
        same([dgamma, dbeta], sums, tolerance)  # type: ignore[arg-type]
    means = [torch.stack(values).mean(0) for values in zip(*map(moving, parts), strict=True)]
    same(moving(ours), means, tolerance)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_bn_of_the_whole_batch_is_torchs_bit_for_bit(momentum: float | None) -> None:
    ours, torchs = BatchNorm(5, momentum=momentum), nn.BatchNorm2d(5, momentum=momentum)
    for _ in range(3):
        x, dy = torch.randn(6, 5, 4, 3), torch.randn(6, 5, 4, 3)
        assert all(torch.equal(a, b) for a, b in zip(step(ours, x, dy), step(torchs, x, dy), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), torchs.buffers(), strict=True))
    assert list(ours.state_dict()) == list(torchs.state_dict())


@FORMATS
@DTYPES
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_gkn_at_gain_1_is_group_norm(
    groups: int, dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format
) -> None:
    ours = KalmanGroupNorm(groups, 6, gain=1, learn_gain=False, noise=False).to(dtype)
    torchs = nn.GroupNorm(groups, 6).to(dtype)
    for layer in (ours, torchs):
        affine(layer, 6)
    x = (2 * torch.randn(4, 6, 4, 3, dtype=dtype) + 3).contiguous(memory_format=memory_format)
    dy, prior = torch.randn(4, 6, 4, 3, dtype=dtype), random_belief(4, 6, dtype)
    for args in ((), (prior,)):
        same(step(ours, x, dy, *args), step(torchs, x, dy), tolerance)


def test_gn_is_torchs() -> None:
    x = torch.randn(4, 12, 3, 3)
    for options, groups in (({}, 12), ({"max_groups": 5}, 4), ({"num_groups": 3}, 3)):
        y = NORMS["gn"](12, stat_batch=2, **options)(x)
        assert torch.equal(y, F.group_norm(x, groups, torch.ones(12), torch.zeros(12)))
    assert [NORMS["gn"](c).num_groups for c in (16, 48, 64, 40, 7)] == [16, 24, 32, 20, 7]
    assert [NORMS["gkn"](c).num_groups for c in (16, 48, 64, 40, 7)] == [16, 24, 32, 20, 7]


def test_the_papers_name_builds_the_same_layer():
    assert type(NORMS["kn"](4, stat_batch=2)) is type(NORMS["bkn"](4, stat_batch=2)) and "kn" not in list(NORMS)
    with pytest.raises(KeyError):
        NORMS["batchnorm"]


# --- the update, by hand ---


@FORMATS
@pytest.mark.parametrize("rows", ["one for all", "one per group"])
@pytest.mark.parametrize("mixture", [False, True])
def test_update_is_equation_7(mixture: bool, rows: str, memory_format: torch.memory_format) -> None:
    groups, q = 3, 0.3
    layer = KalmanBatchNorm2d(5, stat_batch=2, gain=q, mixture=mixture, eps=1e-3).double()
    affine(layer, 5)
    with torch.no_grad():
        layer.noise_raw.copy_(torch.linspace(-3, 1, 5))  # type: ignore[union-attr]
    noise = torch.linspace(-3, 1, 5, dtype=D).exp().log1p()
    prior = random_belief(1 if rows == "one for all" else groups, 5, D)
    x = (2 * torch.randn(6, 5, 4, 3, dtype=D) + 1).contiguous(memory_format=memory_format)
    y, posterior = layer(x, beliefs=prior)
    for g in range(groups):
        images, row = x[g::groups].transpose(0, 1).flatten(1), 0 if rows == "one for all" else g
        measured_mean, measured_var = images.mean(1), images.var(1, correction=0)
        mean = (1 - q) * prior.mean[row] + q * measured_mean
        var = (1 - q) * (prior.var[row] + noise) + q * measured_var
        if mixture:
            var = var + (1 - q) * q * (measured_mean - prior.mean[row]).square()
        assert error(posterior.mean[g], mean) < 1e-7 and error(posterior.var[g], var) < 1e-7  # q is a float32 number
        gamma, beta = layer.weight.view(1, 5, 1, 1), layer.bias.view(1, 5, 1, 1)
        scaled = (x[g::groups] - mean.view(1, 5, 1, 1)) * (var + 1e-3).rsqrt().view(1, 5, 1, 1)
        assert error(y[g::groups], scaled * gamma + beta) < 1e-6


def test_learned_parameters_start_where_they_should() -> None:
    for layer in (KalmanBatchNorm2d(7), KalmanGroupNorm(1, 7)):
        assert float(layer.gain.detach()) == pytest.approx(0.5) and layer.gain_logit is not None
        assert layer.gain_logit.shape == (1,) and layer.gain_logit.requires_grad  # one per layer
        assert layer.noise_raw is not None and layer.noise_raw.shape == (7,)  # one per channel
        torch.testing.assert_close(F.softplus(layer.noise_raw), torch.full((7,), 0.02))
        assert sum(p.numel() for p in layer.parameters()) == 7 + 7 + 7 + 1  # what Table 2 counts
    assert float(KalmanBatchNorm2d(7, gain=0.1).gain.detach()) == pytest.approx(0.1)
    assert layer.mixture  # Cov(x - mu), paper 3.2
    fixed = KalmanBatchNorm2d(7, gain=0.9, learn_gain=False, noise=False)
    assert fixed.gain == 0.9 and sum(p.numel() for p in fixed.parameters()) == 14


@pytest.mark.parametrize("learn_gain", [False, True])
def test_the_gain_follows_from_the_number_of_measured_values(learn_gain: bool) -> None:
    layer = KalmanBatchNorm2d(5, stat_batch=2, gain=None, prior_values=24.0, learn_gain=learn_gain)
    for size in (2, 4):
        layer(torch.randn(6, 5, size, 3), random_belief(3, 5))
        values = 2 * size * 3
        assert layer.gain_value == pytest.approx(values / (values + 24))
    grouped = KalmanGroupNorm(2, 6, gain=None, prior_values=27.0, learn_gain=learn_gain)
    grouped(torch.randn(4, 6, 3, 3), random_belief(4, 6))
    assert grouped.gain_value == pytest.approx(0.5)  # 3 channels of 9 pixels
    for wrong in ({"gain": 0.5, "prior_values": 24.0}, {"gain": None}, {"gain": None, "prior_values": 0.0}):
        with pytest.raises(ValueError, match="prior_values"):
            KalmanBatchNorm2d(5, **wrong)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_variance_alone_can_be_predicted(memory_format: torch.memory_format) -> None:
    layer = KalmanBatchNorm2d(5, stat_batch=2, gain=0.25, learn_gain=False, noise=False, predict="var", eps=1e-3)
    layer = layer.double()
    x = (torch.randn(6, 5, 4, 3, dtype=D) + 3).contiguous(memory_format=memory_format)
    prior = random_belief(3, 5, D)
    y, posterior = layer(x, prior)
    for g in range(3):
        images = x[g::3].transpose(0, 1).flatten(1)
        mean, var = images.mean(1), 0.75 * prior.var[g] + 0.25 * images.var(1, correction=0)
        assert error(posterior.mean[g], mean) < 1e-12 and error(posterior.var[g], var) < 1e-12
        assert error(y[g::3], (x[g::3] - mean.view(1, 5, 1, 1)) * (var + 1e-3).rsqrt().view(1, 5, 1, 1)) < 1e-10


def test_noise_relative_to_the_prior() -> None:
    layer = KalmanBatchNorm2d(5, noise="relative")
    prior = random_belief(3, 5)
    torch.testing.assert_close(layer.predicted(prior).var, 1.02 * prior.var)
    assert torch.equal(layer.predicted(prior).mean, prior.mean)


def test_the_guard_keeps_the_measurement_of_dead_channels() -> None:
    """0 / 0: the released code's comparison is false then."""
    layer = KalmanBatchNorm2d(2, stat_batch=2, gain=0.1, learn_gain=False, noise=False, guard=100.0)
    x = torch.zeros(4, 2, 3, 3)
    posterior = layer(x, Belief(torch.ones(2, 2), torch.zeros(2, 2)))[1]
    assert torch.equal(posterior.mean, torch.zeros(2, 2)) and torch.equal(posterior.var, torch.zeros(2, 2))


@pytest.mark.parametrize("belief", ["output", "posterior"])
def test_output_beliefs_know_nothing_of_a_weights_scale(belief: str) -> None:
    """N(beta, gamma^2) stays, so that the prior of the next layer, and the network's output, stay as they were. The
    posterior's scale is the weight's, and the next prior's follows it."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))))
    model = convert(net, "bkn", stat_batch=2, belief=belief, gain=0.3, noise=False, eps=1e-12).double()
    x = torch.randn(6, 4, 12, 12, dtype=D)
    before = model(x)
    with torch.no_grad():
        net_weight = model.get_submodule("0").weight
        net_weight.mul_(3)
    after = error(model(x), before)
    assert after < 1e-9 if belief == "output" else after > 1e-2


@pytest.mark.parametrize("with_prior", [False, True])
def test_gkn_prior_is_the_mixture_of_the_channels_of_a_group(with_prior: bool) -> None:
    layer = KalmanGroupNorm(2, 6, gain=0.3, mixture=True, eps=1e-3).double()
    affine(layer, 6)
    x, prior = torch.randn(4, 6, 3, 3, dtype=D), random_belief(4, 6, D)
    y, posterior = layer(x, beliefs=prior if with_prior else ())
    for n in range(4):
        for g in range(2):
            channels = slice(3 * g, 3 * g + 3)
            mean, var = x[n, channels].mean(), x[n, channels].var(correction=0)
            if with_prior:
                means, variances = prior.mean[n, channels], prior.var[n, channels] + 0.02
                prior_mean, prior_var = means.mean(), variances.mean() + means.var(correction=0)
                spread = 0.21 * (mean - prior_mean).square()
                mean, var = 0.7 * prior_mean + 0.3 * mean, 0.7 * prior_var + 0.3 * var + spread
            assert error(posterior.mean[n, channels], mean.expand(3)) < 1e-6
            assert error(posterior.var[n, channels], var.expand(3)) < 1e-6
            gamma, beta = (t[channels].view(3, 1, 1) for t in (layer.weight, layer.bias))
            assert error(y[n, channels], (x[n, channels] - mean) * (var + 1e-3).rsqrt() * gamma + beta) < 1e-6


def test_belief_handed_on() -> None:
    x, prior = torch.randn(4, 6, 3, 3), random_belief(2, 6)
    for layer in (KalmanBatchNorm2d(6, stat_batch=2, belief="output"), KalmanGroupNorm(2, 6, belief="output")):
        affine(layer, 6)
        given = Belief(*(t.repeat(2, 1) for t in prior)) if isinstance(layer, KalmanGroupNorm) else prior
        b = layer(x, beliefs=given)[1]
        assert torch.equal(b.mean, layer.bias.expand_as(b.mean))
        assert torch.equal(b.var, layer.weight.square().expand_as(b.var))
        assert b.mean.requires_grad and b.var.requires_grad
    values = 2 * 9
    unbiased = KalmanBatchNorm2d(6, stat_batch=2, first_unbiased=True)
    biased = KalmanBatchNorm2d(6, stat_batch=2)
    first = unbiased(x, beliefs=())[1], biased(x, beliefs=())[1]
    assert error(first[0].var, first[1].var * values / (values - 1)) < 1e-6
    assert torch.equal(unbiased(x), biased(x)) and error(unbiased.running_var, biased.running_var) < 1e-6
    assert torch.equal(unbiased(x, beliefs=prior)[1].var, biased(x, beliefs=prior)[1].var)  # only without a prior


# --- groups, memory formats, types ---


@FORMATS
@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_groups_do_not_leak(norm: str, memory_format: torch.memory_format) -> None:
    layer = NORMS[norm](5, **({} if norm == "gkn" else {"stat_batch": 2}))
    x = torch.randn(8, 5, 4, 3).contiguous(memory_format=memory_format)
    groups = 8 if norm == "gkn" else 4
    prior = random_belief(groups, 5)
    changed, other_prior = x.clone(memory_format=torch.preserve_format), Belief(*(t.clone() for t in prior))
    changed[5] *= 3
    other_prior.mean[5 % groups] += 1
    (y, b), (z, c) = estimated(layer, x, prior), estimated(layer, changed, other_prior)
    for image in range(8):
        assert torch.equal(y[image], z[image]) is (image % groups != 5 % groups), image
    for row in range(groups if b is not None else 0):
        assert torch.equal(b.mean[row], c.mean[row]) is torch.equal(b.var[row], c.var[row]) is (row != 5 % groups)


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_channels_last_is_contiguous(norm: str) -> None:
    options: dict[str, Any] = {} if norm == "gkn" else {"stat_batch": 2}
    layers = [NORMS[norm](6, **options).double() for _ in range(2)]
    x, dy = torch.randn(8, 6, 4, 3, dtype=D), torch.randn(8, 6, 4, 3, dtype=D)
    prior = random_belief(8 if norm == "gkn" else 4, 6, D)
    found = []
    for layer, memory_format in zip(layers, (torch.contiguous_format, torch.channels_last), strict=True):
        b = Belief(*leaves(*prior))
        found.append(step(layer, x.contiguous(memory_format=memory_format), dy, b))
        found[-1] += [p.grad for p in layer.parameters()]
        found[-1] += [] if norm == "bn" else [b.mean.grad, b.var.grad]  # type: ignore[list-item]
    same(*found, 1e-12)
    same(*(list(layer.buffers()) for layer in layers), 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_two_dimensional_inputs(norm: str) -> None:
    options: dict[str, Any] = {"num_groups": 2} if norm == "gkn" else {"stat_batch": 4}
    flat, spatial = NORMS[norm](6, **options), NORMS[norm](6, **options)
    x, dy = torch.randn(8, 6), torch.randn(8, 6)
    prior = random_belief(8 if norm == "gkn" else 2, 6)
    found = step(flat, x, dy, prior)
    assert found[0].shape == (8, 6)
    expected = step(spatial, x[:, :, None, None], dy[:, :, None, None], prior)
    same([found[0], found[1]], [expected[0][..., 0, 0], expected[1][..., 0, 0]], 1e-6)
    same(found[2:], expected[2:], 1e-6)
    if norm == "bn":
        reference = nn.BatchNorm1d(6)
        assert error(flat(x)[1::2].detach(), reference(x[1::2]).detach()) < 1e-6


@FORMATS
@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn"])
def test_statistics_are_float32_under_autocast(norm: str, memory_format: torch.memory_format) -> None:
    options: dict[str, Any] = {"num_groups": 2} if norm == "gkn" else {"stat_batch": 2}
    cast, exact = NORMS[norm](6, **options), NORMS[norm](6, **options)
    conv, torchs = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6) if norm == "gkn" else nn.BatchNorm2d(6)
    prior = random_belief(4 if norm == "gkn" else 2, 6)
    image = torch.randn(4, 3, 10, 10).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(image) + 5
        y, b = estimated(cast, x, prior)
        assert x.dtype == torch.bfloat16 and y.dtype == torchs(x).dtype
    expected, c = estimated(exact, x.detach().float(), prior)
    assert error(y.detach().float(), expected.detach()) < 1e-2
    if b is not None:
        assert b.mean.dtype == b.var.dtype == torch.float32
        assert error(b.mean, c.mean) < 1e-5 and error(b.var, c.var) < 1e-5  # of the same bf16 values, in float32
    for a, e in zip(cast.buffers(), exact.buffers(), strict=True):
        assert a.dtype == e.dtype and error(a, e) < 1e-5
    y.float().square().sum().backward()
    assert conv.weight.grad is not None and torch.isfinite(conv.weight.grad).all()


@FORMATS
@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_variance_does_not_cancel(norm: str, memory_format: torch.memory_format) -> None:
    """A mean of a thousand deviations: E[x^2] - E[x]^2 in float32 would have no digit left."""
    layer = NORMS[norm](3, stat_batch=4, momentum=1.0, moving_unbiased=False)
    x = (torch.randn(8, 3, 16, 16) + 1000).contiguous(memory_format=memory_format)
    layer(x)
    exact = torch.stack([x[g::2].double().var((0, 2, 3), correction=0) for g in range(2)]).mean(0)
    assert error(layer.running_var, exact) < 1e-5


# --- errors ---


@pytest.mark.parametrize("norm", ["bn", "bkn"])
@pytest.mark.parametrize(("stat_batch", "shape"), [(1, (4, 3, 1, 1)), (1, (4, 3)), (None, (1, 3, 1, 1))])
def test_statistics_of_a_single_value(norm: str, stat_batch: int | None, shape: tuple[int, ...]) -> None:
    layer = NORMS[norm](3, stat_batch=stat_batch)
    layer.layer_name = "blocks.3.bn1"
    before = copy.deepcopy(layer.state_dict())
    for online in (False, True):
        if online:
            layer.eval()
            set_statistics(layer, "online")
        with pytest.raises(ValueError, match=r"blocks\.3\.bn1: statistics of a single value .*stat_batch"):
            layer(torch.randn(shape))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    set_statistics(layer, "moving")
    layer(torch.randn(shape))  # moving statistics have no such trouble


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_batches_that_do_not_divide(norm: str) -> None:
    layer = NORMS[norm](3, stat_batch=4)
    layer.layer_name = "stem.bn"
    with pytest.raises(ValueError, match=r"stem\.bn: a batch of 6 images .* stat_batch = 4"):
        layer(torch.randn(6, 3, 2, 2))
    with pytest.raises(ValueError, match=r"stem\.bn: a batch of 2 images .* stat_batch = 4"):
        layer(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"stem\.bn: expected an input \[N, C, \.\.\.\], got \(3,\)"):
        layer(torch.randn(3))


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("bkn", {"gain": 1}, "gain 1 cannot be learned"),
        ("gkn", {"gain": 1.0}, "gain 1 cannot be learned"),
        ("bkn", {"gain": 0}, r"gain must lie in \(0, 1\], not 0"),
        ("bkn", {"gain": 1.5, "learn_gain": False}, "not 1.5"),
        ("gkn", {"gain": -0.1}, r"not -0\.1"),
        ("bkn", {"belief": "prior"}, "'posterior' or 'output', not 'prior'"),
        ("bkn", {"guard": 0.0}, r"guard must be positive or None, not 0\.0"),
        ("bkn", {"moving_groups": "last"}, "'mean' or 'first', not 'last'"),
        ("bkn", {"stat_batch": 0}, "stat_batch must be a whole number of at least 1, or None, not 0"),
        ("bn", {"stat_batch": 2.0}, "stat_batch must be a whole number of at least 1, or None, not 2.0"),
        ("bn", {"stat_batch": -2}, "stat_batch must be a whole number of at least 1, or None, not -2"),
        ("gn", {"num_groups": 4}, "4 groups do not divide 6 channels"),
        ("gn", {"num_groups": 0}, "0 groups do not divide 6 channels"),
        ("gkn", {"num_groups": 4}, "4 groups do not divide 6 channels"),
    ],
)
def test_bad_options(norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NORMS[norm](6, **options)


def test_kalman_group_norm_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="4 groups do not divide 6 channels"):
        KalmanGroupNorm(4, 6)


def test_gain_from_the_measurement_alone_needs_no_logit() -> None:
    layer = KalmanBatchNorm2d(3, gain=1, learn_gain=False)
    assert layer.gain == 1 and layer.gain_logit is None and "gain_logit" not in layer.state_dict()
    assert math.isclose(layer.initial_gain, 1)


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn", "brn", "sn"])
def test_a_network_of_halves_trains(norm: str) -> None:
    """Parameters in bfloat16, as x: the statistics stay in float32."""
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)]
    net = convert(nn.Sequential(*layers), norm, stat_batch=None if norm == "gkn" else 2)
    exact = copy.deepcopy(net)
    net.bfloat16()
    x = torch.randn(4, 3, 10, 10)
    y = net(x.bfloat16())
    assert y.dtype == torch.bfloat16 and error(y.detach().float(), exact(x).detach()) < 0.1
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


def test_options_are_looked_up() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match=r"normalizer 'bkn': unknown option 'gian'; did you mean 'gain'"):
        convert(net, "bkn", gian=0.3)


def test_precise_statistics_of_normalizers_without_any() -> None:
    net = convert(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), "gn")
    precise_statistics(net, [torch.randn(2, 3, 8, 8)])
    with pytest.raises(ValueError, match="at least one batch"):
        precise_statistics(net, [])


def test_gradients_of_a_posterior_that_is_read_along_its_groups() -> None:
    """They come in another order in memory."""
    layer, weight, prior = KalmanBatchNorm2d(4, stat_batch=2), torch.randn(4, 2), random_belief(2, 4)
    x, again = leaves(*[torch.randn(4, 4, 5, 5)] * 2)
    (layer(x, beliefs=prior)[1].var.T * weight).sum().backward()
    (layer(again, beliefs=prior)[1].var * weight.T.contiguous()).sum().backward()
    assert torch.equal(x.grad, again.grad)
