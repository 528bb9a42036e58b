"""Batch Renormalization: its formula, its schedule, its place in a training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from contract import CHANNELS, GROUPS, D, build, images
from helpers import Chain, error

from kalmannorm import NORMS, convert, set_progress, set_statistics
from kalmannorm.norm import BatchRenorm
from kalmannorm.norm.renorm import D_REACHED, R_REACHED, WARM_UP


def limits(layer: BatchRenorm) -> tuple[float, float]:
    rmax, dmax = layer.limits.tolist()
    return rmax, dmax


@pytest.mark.parametrize("training", [True, False])
def test_formula(training: bool) -> None:
    """The algorithm's lines, for every group, with r and d from the moving averages before the step; clipped or not."""
    layer = build("brn", D, rmax=1.5, dmax=0.5, eps=1e-3).train(training)
    set_statistics(layer, "online")
    mu, sigma = layer.running_mean.clone(), (layer.running_var + 1e-3).sqrt()
    x = (images(dtype=D) * torch.linspace(0.2, 1, CHANNELS, dtype=D).view(-1, 1, 1)).requires_grad_()
    y = layer(x)
    clipped = []
    for g in range(GROUPS):
        values = x[g::GROUPS].transpose(0, 1).flatten(1)
        mean, deviation = values.mean(1), (values.var(1, correction=0) + 1e-3).sqrt()
        r = (deviation / sigma).clamp(1 / 1.5, 1.5).detach()
        d = ((mean - mu) / sigma).clamp(-0.5, 0.5).detach()
        clipped += [*((r == 1.5) | (r == 1 / 1.5)), *(d.abs() == 0.5)]
        standard = (values - mean[:, None]) / deviation[:, None] * r[:, None] + d[:, None]
        expected = standard * layer.weight[:, None] + layer.bias[:, None]
        own = y[g::GROUPS].transpose(0, 1).flatten(1)
        assert error(own.detach(), expected.detach()) < 1e-12
        gradients = [torch.autograd.grad(out.cos().sum(), x, retain_graph=True)[0] for out in (own, expected)]
        assert error(*gradients) < 1e-9
    assert any(clipped) and not all(clipped)


def test_without_limits_it_normalizes_by_the_moving_averages() -> None:
    layer = build("brn", D, rmax=1e9, dmax=1e9)
    y = layer(images(dtype=D)).detach()
    fresh = build("brn", D).eval()
    assert error(y, fresh(images(dtype=D)).detach()) < 1e-9


def test_schedule() -> None:
    """Plain BN, then linearly to the limits, as fractions of the run; fully relaxed for those who call nothing."""
    layer = NORMS["brn"](CHANNELS)
    assert limits(layer) == (3, 5)
    for fraction, expected in (
        (0, (1, 0)),
        (WARM_UP, (1, 0)),
        ((WARM_UP + D_REACHED) / 2, (1 + 2 * (20 / 2) / 35, 2.5)),
        (D_REACHED, (1 + 2 * 20 / 35, 5)),
        (R_REACHED, (3, 5)),
        (1, (3, 5)),
    ):
        set_progress(layer, fraction)
        assert limits(layer) == pytest.approx(expected)
    set_progress(layer, 0)
    assert "limits" not in layer.state_dict() and limits(copy.deepcopy(layer)) == (1, 0)


@pytest.mark.parametrize("assign", [False, True])
def test_limits_of_a_layer_that_was_made_without_values(assign: bool) -> None:
    with torch.device("meta"):
        layer = BatchRenorm(CHANNELS)
    set_progress(layer, 0.5)
    (layer if assign else layer.to_empty(device="cpu")).load_state_dict(
        BatchRenorm(CHANNELS).state_dict(), assign=assign
    )
    assert limits(layer) == (3, 5)


def test_progress_reaches_the_layers_of_a_network_and_compiled_code() -> None:
    """Without another compilation for every step."""
    torch._dynamo.reset()
    model = convert(Chain(lambda self, x: F.relu(x)), "brn", stat_batch=2)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    counts = []
    for fraction in (0.0, 0.1, 0.11, 0.12, 0.3, 1.0):
        for network in (model, compiled):
            set_progress(network, fraction)
        x = images(8, 3, 6, 6)
        assert error(compiled(x).detach(), model(x).detach()) < 1e-5
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(m.corrects for m in model.modules() if isinstance(m, BatchRenorm))
    assert counts[-1] == counts[1] > counts[0] > 0  # one without and one with the correction


@pytest.mark.parametrize("options", [{"rmax": 0.5}, {"dmax": -1.0}])
def test_bad_limits(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rmax must be at least 1 and dmax at least 0"):
        NORMS["brn"](CHANNELS, **options)
