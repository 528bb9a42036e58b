"""KN's other variants: a learned transition (talk, v1), one R for all layers (v1), a belief of the input."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import images
from helpers import Chain, Residual, Spy, error, random_belief
from torch import Tensor, nn

from kalmannorm import Belief, belief_report, convert, fold
from kalmannorm.norm import Estimator, moments
from kalmannorm.norm.moments import Transition
from kalmannorm.presets import PRESETS, preset_options
from kalmannorm.train.model import optimizer

D = torch.float64
# Residual's convolutions whose input has a belief: all but the stem's.
ON_A_PATH = {"conv1": (12, 8), "conv2": (12, 6), "shortcut.0": (12, 8)}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def x_of(n: int = 4) -> Tensor:
    return images(n, 3, 6, 6)


def transitions(model: nn.Module) -> dict[str, Transition]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Transition)}


def test_paper_and_released_are_what_they_were() -> None:
    """Run ids hang on it: no new keys, no new values."""
    for preset, mixture in (("paper", True), ("eq7", False)):
        assert preset_options(preset, "bkn", 2, {}) == {
            "gain": 0.5, "learn_gain": True, "noise": True, "mixture": mixture, "guard": None,
            "moving_groups": "mean", "first_unbiased": False,
        }  # fmt: skip
    assert preset_options("released", "gkn", 2, {}) == {
        "learn_gain": False, "noise": False, "mixture": True, "guard": 100.0, "gain": 0.1
    }  # fmt: skip
    assert all("transition" not in PRESETS[name]["estimator"] for name in ("paper", "released"))


@pytest.mark.parametrize("preset", ["talk", "v1"])
def test_transitions_start_at_the_sum_of_the_taps(preset: str) -> None:
    model = convert(Residual(), "bkn", stat_batch=2, preset=preset)
    found = transitions(model)
    assert {name.removesuffix("_transition"): tuple(m.matrix.shape) for name, m in found.items()} == ON_A_PATH
    for name, transition in found.items():
        weight = model.get_submodule(name.removesuffix("_transition")).weight
        assert torch.equal(transition.matrix, weight.sum((2, 3))) and transition.matrix.requires_grad
    x = torch.randn(4, 3, 8, 8)
    assert belief_report(model, x) == belief_report(convert(Residual(), "bkn"), x)
    assert not transitions(convert(Residual(), "bkn", preset=preset, transition="weight"))
    assert transitions(convert(Residual(), "gkn", transition="learned")).keys() == found.keys()


@pytest.mark.parametrize("groups", [1, 2])
def test_predicts_by_the_matrix_and_its_squares(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    transition, before = Transition(conv), random_belief(3, 4, D)
    whole = torch.zeros(6, 4, dtype=D)
    for g in range(groups):
        rows, columns = slice(6 // groups * g, 6 // groups * (g + 1)), slice(4 // groups * g, 4 // groups * (g + 1))
        whole[rows, columns] = transition.matrix[rows].detach()
    after = transition(before, conv.bias)
    assert error(after.mean.detach(), (before.mean @ whole.T + conv.bias).detach()) < 1e-12
    for row in range(3):
        covariance = whole @ torch.diag(before.var[row]) @ whole.T
        assert error(after.var[row].detach(), covariance.diag()) < 1e-12
    # The mean starts where the weight's own prediction is; the variance does not: (sum of taps)^2, not sum of squares.
    own = moments.conv(before, conv.weight, conv.bias, groups)
    assert error(after.mean.detach(), own.mean.detach()) < 1e-12


def test_the_normalizer_takes_its_prior_from_the_transition() -> None:
    model = convert(Residual(), "bkn", stat_batch=2, preset="talk", belief="output").double()
    spy = Spy(model)
    model(x_of().double())
    bn = model.get_submodule("bn")
    rectified = moments.relu(Belief(bn.bias[None], bn.weight.square()[None]))
    expected = model.get_submodule("conv1_transition")(rectified)
    for found, wanted in zip(spy.prior["bn1"], expected, strict=True):
        assert error(found.detach(), wanted.detach()) < 1e-12


def test_v1_shares_one_scalar() -> None:
    """One parameter under every layer's name, in every kind of copy, and one count."""
    model = convert(Residual(), "bkn", stat_batch=2, preset="v1")

    def shared(network: nn.Module) -> bool:
        layers = [m for m in network.modules() if isinstance(m, Estimator)]
        return len(layers) == 4 and len({id(m.noise_raw) for m in layers}) == 1

    paper, talk = convert(Residual(), "bkn"), convert(Residual(), "bkn", preset="talk")
    count = {
        name: sum(p.numel() for p in m.parameters()) for name, m in (("paper", paper), ("talk", talk), ("v1", model))
    }
    assert count["talk"] - count["paper"] == 12 * 8 + 12 * 6 + 12 * 8
    assert count["talk"] - count["v1"] == (8 + 12 + 12 + 12) - 1
    for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert shared(network)
        assert F.softplus(network.get_submodule("bn1").noise_raw).item() == pytest.approx(0.02)
    groups = optimizer(model, momentum=0.9, weight_decay=1e-4).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert convert(Residual(), "gkn", noise="shared").get_submodule("bn").noise_raw.shape == (1,)
    with pytest.raises(ValueError, match="noise must be True, False, 'shared' or 'relative', not 'all'"):
        convert(Residual(), "bkn", noise="all")


@pytest.mark.parametrize("preset", ["talk", "v1"])
def test_copies_state_and_fold(preset: str) -> None:
    model = convert(Residual(), "bkn", stat_batch=2, preset=preset)
    optim = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optim.zero_grad()
        model(x_of()).square().mean().backward()
        optim.step()
    for transition in transitions(model).values():
        assert transition.matrix.grad is not None and transition.matrix.grad.any()
    fresh = convert(Residual(), "bkn", stat_batch=2, preset=preset)
    fresh.load_state_dict(model.state_dict())
    assert {f"{name}_transition.matrix" for name in ON_A_PATH} <= set(model.state_dict())
    x = x_of()
    expected = copy.deepcopy(model)(x)
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        twin(x).sum().backward()
    folded = fold(model.eval())
    assert list(folded.state_dict()) == list(Residual().state_dict())
    assert error(folded(x).detach(), model(x).detach()) < 1e-5
    again = convert(model, "bkn", preset=preset)  # from the weights as they are now
    assert torch.equal(again.get_submodule("conv1_transition").matrix, model.conv1.weight.sum((2, 3)))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("preset", ["talk", "v1"])
@pytest.mark.usefixtures("process_group")
def test_ddp_needs_no_search_for_unused_parameters(preset: str, frozen: bool) -> None:
    """Also where normalizers are frozen in evaluation mode, whose priors are not used."""
    model = convert(Residual(), "bkn", stat_batch=2, preset=preset)
    if frozen:
        model.bn1.eval(), model.bn2.eval()
    wrapped, alone = nn.parallel.DistributedDataParallel(model), copy.deepcopy(model)
    for network in (wrapped, alone) * 3:  # a parameter without a gradient would end the second step
        network.zero_grad()
        network(x_of()).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.slow
def test_compiled() -> None:
    """As the contract has it of the other presets."""
    torch._dynamo.reset()
    model = convert(Chain(lambda self, x: F.relu(x)), "bkn", stat_batch=2, preset="v1")
    twin = copy.deepcopy(model)
    run = torch.compile(twin, backend="aot_eager", fullgraph=True)
    losses = [forward(x_of()).square().mean() for forward in (model, run)]
    for loss in losses:
        loss.backward()
    assert error(losses[1].detach(), losses[0].detach()) < 1e-5
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) is (b.grad is None) and ("transition" not in name or a.grad is not None), name
        assert a.grad is None or b.grad is None or (a.grad - b.grad).abs().max() < 1e-4, name


def test_options_that_go_together_and_those_that_do_not() -> None:
    with pytest.raises(ValueError, match="transition must be 'weight' or 'learned', not 'own'"):
        convert(Residual(), "bkn", transition="own")
    with pytest.raises(ValueError, match="predictor='sampling' convolves with the layer's weight"):
        convert(Residual(), "bkn", preset="v1", predictor="sampling")
    given = {"preset": "talk", "predictor": "closed", "input_belief": ([0.0] * 3, [1.0] * 3)}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name} is an option of bkn and gkn: normalizer 'bn' has no belief"):
            convert(Residual(), "bn", **{name: value})
    with pytest.raises(ValueError, match=r"'bn'.*transition"):
        convert(Residual(), "bn", transition="learned")
