"""Every entry of NORMS against the contract (contract.py); exact reductions of one normalizer to another."""

import itertools
from typing import Any

import pytest
import torch
from contract import CHANNELS, CHECKS, IMAGES, STAT_BATCH, D, build, images
from helpers import affine, error, moving
from torch import Tensor, nn

from kalmannorm import NORMS, KalmanBatchNorm2d, set_progress, set_statistics
from kalmannorm.norm.switchable import MIXED


def dear(norm: str, check: str) -> bool:
    """Compilers take seconds: one normalizer stands for all where tests are to be quick."""
    return check == "compiled" and norm != "bkn"


@pytest.mark.parametrize(
    ("norm", "check"),
    [pytest.param(*case, marks=pytest.mark.slow if dear(*case) else ()) for case in itertools.product(NORMS, CHECKS)],
)
def test_contract(norm: str, check: str) -> None:
    CHECKS[check](norm)


@pytest.mark.parametrize("norm", NORMS)
def test_constructors_refuse_unknown_options(norm: str) -> None:
    """By the name of NORMS and by the class, as the ValueError of other bad options and the TypeError of Python's."""
    for builds in (NORMS[norm], type(NORMS[norm](CHANNELS))):
        for kind in (ValueError, TypeError):
            with pytest.raises(kind, match=r"^\w+: unknown option 'gian'; .*valid: [^']*$"):
                builds(gian=0.3)


def test_a_constructor_knows_what_a_subclass_hands_on() -> None:
    class Own(KalmanBatchNorm2d):
        def __init__(self, channels: int, *, own: int = 1, **options: Any) -> None:
            super().__init__(channels, **options)
            self.own = own

    assert Own(channels=4, own=2, gain=0.3).gain_value == pytest.approx(0.3)
    with pytest.raises(ValueError, match="Own: unknown option 'onw'; did you mean 'own'"):
        Own(4, onw=2)


# --- exact reductions (KN and GKN at gain 1: test_norm.py; SyncBN on k processes: test_distributed.py) ---


def results(layer: nn.Module, steps: int = 3) -> list[list[Tensor]]:
    """Output, gradients and moving statistics of some steps; then the outputs in evaluation."""
    found = []
    for step in range(steps):
        x = (images(dtype=D) * (step + 1)).requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y.cos().sum(), [x, layer.weight, layer.bias])  # type: ignore[list-item]
        averages = moving(layer) if getattr(layer, "running_mean", None) is not None else []
        found.append([y.detach(), *gradients, *(t.clone() for t in averages)])
    layer.eval()
    for statistics in ("moving", "online"):
        set_statistics(layer, statistics)
        found.append([layer(images(dtype=D)).detach()])
    return found


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    for first, second in zip(results(a), results(b), strict=True):
        for x, y in zip(first, second, strict=True):
            assert error(x, y) <= tolerance


@pytest.mark.parametrize("stat_batch", [STAT_BATCH, None])
@pytest.mark.parametrize("how", ["limits", "schedule"])
def test_brn_without_correction_is_bn(how: str, stat_batch: int | None) -> None:
    limits = {"rmax": 1.0, "dmax": 0.0} if how == "limits" else {}
    brn, bn = build("brn", D, stat_batch=stat_batch, **limits), build("bn", D, stat_batch=stat_batch)
    if how == "schedule":
        set_progress(brn, 0.01)
    assert not brn.corrects
    assert_same(brn, bn, 0)


def test_brn_s_corrected_form_at_r_1_and_d_0_is_bn() -> None:
    brn, bn = build("brn", D), build("bn", D)
    one, zero = torch.ones(1, CHANNELS, dtype=D), torch.zeros(1, CHANNELS, dtype=D)
    brn.correction = lambda mean, var: (one.expand_as(mean), zero.expand_as(mean))  # type: ignore[assignment]
    assert brn.corrects
    assert_same(brn, bn)


def test_ln_and_in_are_torchs_and_gn_s() -> None:
    torchs_ln, torchs_in = nn.LayerNorm((CHANNELS, 4, 3)).double(), nn.InstanceNorm2d(CHANNELS, affine=True).double()
    x = images(dtype=D)
    for norm, groups, torchs in (("ln", 1, torchs_ln), ("in", CHANNELS, torchs_in)):
        layer = NORMS[norm](CHANNELS, stat_batch=2, momentum=0.1).double()
        assert error(layer(x).detach(), torchs(x).detach()) < 1e-12
        layer, gn = build(norm, D), build("gn", D, num_groups=groups)
        assert_same(layer, gn, 0)
    affine(torchs_in, CHANNELS)
    assert_same(build("in", D), torchs_in)


@pytest.mark.parametrize("part", MIXED)
def test_sn_of_one_part_is_that_part(part: str) -> None:
    sn, alone = build("sn", D), build(part, D)
    with torch.no_grad():
        for logits in (sn.mean_weight, sn.var_weight):
            logits.copy_(torch.tensor([1e4 if name == part else 0.0 for name in MIXED]))
    found = results(sn), results(alone)
    for first, second in zip(*found, strict=True):
        for x, y in zip(first, second, strict=False):  # IN and LN keep no moving statistics
            assert error(x, y) < 1e-12


def test_sn_weighs_means_and_variances_apart() -> None:
    sn, x = build("sn", D), images(dtype=D)
    with torch.no_grad():
        sn.mean_weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        sn.var_weight.copy_(torch.tensor([-0.3, 1.5, 0.1]))
    groups = IMAGES // STAT_BATCH
    of_group = [x[g::groups].transpose(0, 1).flatten(1) for g in range(groups)]
    w, v = torch.softmax(sn.mean_weight, 0), torch.softmax(sn.var_weight, 0)
    for statistics in ("online", "moving"):
        set_statistics(sn.eval(), statistics)
        y = sn(x)
        for i in range(IMAGES):
            pixels, values = x[i].flatten(1), of_group[i % groups]
            bn = (values.mean(1), values.var(1, correction=0)) if statistics == "online" else moving(sn)
            mean = w[0] * pixels.mean(1) + w[1] * pixels.mean() + w[2] * bn[0]
            var = v[0] * pixels.var(1, correction=0) + v[1] * pixels.var(correction=0) + v[2] * bn[1]
            expected = (pixels - mean[:, None]) * torch.rsqrt(var + sn.eps)[:, None]
            expected = expected * sn.weight[:, None] + sn.bias[:, None]
            assert error(y[i].flatten(1).detach(), expected.detach()) < 1e-12


def test_sn_without_bn_is_of_in_and_ln_alone() -> None:
    two, three = (NORMS["sn"](CHANNELS, stat_batch=STAT_BATCH, mixed=m).double() for m in (["in", "ln"], MIXED))
    x = images(dtype=D)
    assert two.running_mean is None and len(two.mean_weight) == len(two.var_weight) == 2
    with torch.no_grad():
        for name in ("mean_weight", "var_weight"):
            start = torch.tensor([0.5, -1.0], dtype=D)
            getattr(two, name).copy_(start)
            getattr(three, name).copy_(torch.tensor([0.5, -1.0, -1e4], dtype=D))
    for training in (True, False):
        assert error(two.train(training)(x).detach(), three.train(training)(x).detach()) < 1e-12
    assert error(two(x[:1]).detach(), two(x)[:1].detach()) < 1e-12
    with pytest.raises(ValueError, match="mixed must be"):
        NORMS["sn"](CHANNELS, mixed=["bn"])


def test_frozen_bn_is_bn_s_affine() -> None:
    frozen, bn = build("frozen", D), build("bn", D).eval()
    frozen.load_state_dict(bn.state_dict())
    x = images(dtype=D)
    for training in (True, False):
        assert torch.equal(frozen.train(training)(x), bn(x))
    assert not list(frozen.parameters())
