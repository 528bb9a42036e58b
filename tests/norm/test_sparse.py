"""SparsestMax and SSN: properties at ties, the schedule, choices that stay."""

import copy
import math

import pytest
import torch
from helpers import error
from torch import nn

from kalmannorm import NORMS, set_progress
from kalmannorm.norm import SparseSwitchableNorm
from kalmannorm.norm.modes import finish_gradients
from kalmannorm.norm.sparse import sparsemax, sparsestmax
from kalmannorm.train.model import optimizer

D = torch.float64
TIES = ([1.0, 1.0, 1.0], [1.0, 1.0, 0.9], [1.0, 0.9, 0.9], [2.0, 2.0, -5.0], [0.5, 0.2, 0.5], [0.0, 3.0, 0.0])
ALL_CORNERS = math.sqrt(2 / 3)
RADII = [0.0, 0.1, 0.3, 0.408, 0.41, 0.5, 0.7, 0.708, 0.75, 0.81, 0.82, 1.0]


def logits(dtype=D):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 3, generator=generator, dtype=dtype) / 2


def test_sparsemax_is_the_projection_on_the_simplex():
    """Against the conditions of optimality: z - w is one constant on the support, no larger elsewhere."""
    for z in logits():
        w = sparsemax(z)
        assert w.min() >= 0 and abs(w.sum() - 1) < 1e-12
        threshold = (z - w)[w > 0]
        assert error(threshold, threshold[:1].expand_as(threshold)) < 1e-12
        assert (z[w == 0] <= threshold[0] + 1e-12).all()


@pytest.mark.parametrize("first_face", ["whole", "cut"])
@pytest.mark.parametrize("radius", RADII)
def test_weights_leave_the_circle(radius, first_face):
    centre = torch.full((3,), 1 / 3, dtype=D)
    for z in logits():
        p = sparsestmax(z, radius, first_face=first_face)
        assert p.min() >= 0 and abs(p.sum() - 1) < 1e-12
        assert (p - centre).norm() >= min(radius, ALL_CORNERS) - 1e-9
        if radius > ALL_CORNERS:
            assert torch.equal(p, torch.eye(3, dtype=D)[z.argmax()])


def test_of_two_logits():
    """Weights on a segment: pushed out to the radius, its ends from sqrt(1/2) on."""
    z = torch.tensor([0.3, 0.1], dtype=D)
    for radius in (0.0, 0.1, 0.5, 0.7):
        away = max(0.1, radius / math.sqrt(2))
        assert error(sparsestmax(z, radius), torch.tensor([0.5 + away, 0.5 - away], dtype=D)) < 1e-12
    assert sparsestmax(z, 0.72).tolist() == [1, 0]
    with pytest.raises(ValueError, match="first_face must be one of whole, cut, not 'middle'"):
        sparsestmax(z, 0.1, first_face="middle")


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("tie", TIES, ids=str)
def test_ties_give_weights_and_finite_gradients(tie, radius, dtype):
    z = torch.tensor(tie, dtype=dtype, requires_grad=True)
    p = sparsestmax(z, radius)
    assert p.min() >= 0 and abs(p.sum().item() - 1) < 1e-6
    (gradient,) = torch.autograd.grad((p * torch.tensor([1.0, 2.0, 4.0], dtype=dtype)).sum(), z)
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 100
    if radius > ALL_CORNERS:
        assert p.argmax() == tie.index(max(tie)) and p.max() == 1


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_a_lead_of_one_is_a_choice_at_any_radius(dtype):
    """Exactly, whatever sparsemax's rounding: public code pushes what is a corner but for that away from it."""
    found = [z.sort().values for z in 8 * logits(dtype)]
    for z in (z for z in found if z[2] > z[1] + 1):
        for radius in RADII:
            assert sparsestmax(z, radius).tolist() == [0, 0, 1]
    assert sum(z[2] > z[1] + 1 for z in found) > 20


def layer_and_input(radius):
    torch.manual_seed(0)
    layer = SparseSwitchableNorm(4, stat_batch=2)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.2, 0.9, 0.4]))
        layer.var_weight.copy_(torch.tensor([1.0, 0.3, 0.5]))
    set_progress(layer, radius)
    return layer, torch.randn(4, 4, 3, 3)


def test_a_choice_is_for_good():
    layer, x = layer_and_input(0.9)
    layer.eval()(x)
    assert layer.chosen == (None, None)  # made in training alone
    layer.train()(x)
    assert layer.chosen == ("ln", "in") and layer.chosen_at.tolist() == pytest.approx([0.9, 0.9])
    with torch.no_grad():  # an optimizer's momentum moves the logits on
        layer.mean_weight.copy_(torch.tensor([5.0, 0.0, 0.0]))
    set_progress(layer, 0.0)
    y = layer(x)
    y.cos().sum().backward()
    assert layer.chosen == ("ln", "in") and layer.weights == {"mean": [0, 1, 0], "var": [1, 0, 0]}
    assert layer.mean_weight.tolist() == [0, 1, 0]
    assert not layer.mean_weight.grad.any() and not layer.var_weight.grad.any()


def test_state_dict_keeps_choices_and_radius():
    layer, x = layer_and_input(0.9)
    layer(x)
    fresh = SparseSwitchableNorm(4, stat_batch=2)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert fresh.chosen == layer.chosen == ("ln", "in") and fresh.radius == layer.radius
    assert torch.equal(fresh.eval()(x), layer.eval()(x))


def test_mean_and_variance_choose_apart():
    layer, _ = layer_and_input(0.0)
    with torch.no_grad():
        layer.var_weight.copy_(torch.tensor([0.5, 0.45, 0.4]))
    x = torch.randn(4, 4, 3, 3)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.0, 3.0, 0.0]))  # a corner of sparsemax already
    layer(x)
    assert layer.chosen == ("ln", None)


def test_every_layer_has_chosen_where_the_circle_holds_the_simplex():
    torch.manual_seed(0)
    model = nn.Sequential(*(NORMS["ssn"](4, stat_batch=2) for _ in range(2)))
    x = torch.randn(4, 4, 3, 3)
    steps = 100
    for step in range(steps):
        set_progress(model, step / steps)
        y = x
        for layer in model:
            y = layer(y)
        chosen = all(None not in layer.chosen for layer in model)
        assert chosen or step <= math.ceil(steps * ALL_CORNERS)
    assert chosen


def test_logits_have_a_tenth_of_the_rate_and_clipped_gradients():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS["ssn"](4))
    optim = optimizer(model, momentum=0.9, weight_decay=0.1)
    (group,) = (g for g in optim.param_groups if "part_of_rate" in g)
    assert group["part_of_rate"] == 0.1 and group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(model[1].mean_weight), id(model[1].var_weight)]
    assert sum(len(g["params"]) for g in optim.param_groups) == len(list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    finish_gradients(model)
    together = torch.cat([model[1].mean_weight.grad, model[1].var_weight.grad])
    assert error(together.norm(), torch.tensor(1.0)) < 1e-5
    assert (model[0].weight.grad == 10).all() and (model[1].weight.grad == 10).all()
