"""Moving, online and precise statistics; probes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Perceptron, affine, error, estimated, moving, quick, random_belief, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from kalmannorm import NORMS, Belief, KalmanBatchNorm2d, convert, precise_statistics, set_statistics
from kalmannorm.norm import BatchNorm
from kalmannorm.norm.modes import flush_moving, place_batch, probing, spread_batches


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("norm", ["bn", "bkn"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("which", ["mean", "first"])
def test_moving_averages_are_of_what_normalizes(which: str, unbiased: bool, norm: str) -> None:
    layer = NORMS[norm](5, stat_batch=2, moving_groups=which, moving_unbiased=unbiased, momentum=0.3)
    expected = [torch.zeros(5), torch.ones(5)]
    for _ in range(3):
        x = torch.randn(6, 5, 4, 3) + 1
        b = estimated(layer, x, random_belief(3, 5))[1]
        if b is None:
            groups = torch.stack([x[g::3].transpose(0, 1).flatten(1) for g in range(3)])
            b = Belief(groups.mean(2), groups.var(2, correction=0))
        var = b.var * (24 / 23 if unbiased else 1)
        new = [b.mean[0], var[0]] if which == "first" else [b.mean.mean(0), var.mean(0)]
        expected = [0.7 * old + 0.3 * value.detach() for old, value in zip(expected, new, strict=True)]
    same(moving(layer), expected, 1e-5)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_momentum_none_is_the_cumulative_average(norm: str) -> None:
    layer = NORMS[norm](5, stat_batch=2, momentum=None, moving_unbiased=True)
    measured = []
    for _ in range(3):
        x = torch.randn(6, 5, 4, 3) + 1
        layer(x)
        measured += [x[g::3].transpose(0, 1).flatten(1) for g in range(3)]
    expected = [torch.stack([m.mean(1) for m in measured]).mean(0), torch.stack([m.var(1) for m in measured]).mean(0)]
    same(moving(layer), expected, 1e-5)


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_moving_statistics_in_evaluation(norm: str) -> None:
    """They take any batch size, ignore the prior, do not change, and are the belief that is handed on."""
    layer = NORMS[norm](5, stat_batch=4)
    affine(layer, 5)
    layer(torch.randn(8, 5, 4, 3) + 1)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 5, 4, 3)
    y, b = estimated(layer, x, random_belief(1, 5))
    assert torch.equal(y, F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    if norm == "bkn":
        assert torch.equal(b.mean, layer.running_mean[None]) and torch.equal(b.var, layer.running_var[None])


@pytest.mark.parametrize("stat_batch", [2, None])
@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_online_statistics_in_evaluation(norm: str, stat_batch: int | None) -> None:
    """The same groups and estimator as in training, prior included; nothing moves."""
    layer = NORMS[norm](5, stat_batch=stat_batch)
    x, prior = torch.randn(6, 5, 4, 3) + 1, random_belief(1, 5)
    trained = estimated(layer, x, prior)[0]
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    assert not torch.equal(estimated(layer, x, prior)[0], trained)
    set_statistics(layer, "online")
    assert torch.equal(estimated(layer, x, prior)[0], trained)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    set_statistics(layer, "moving")
    assert not torch.equal(estimated(layer, x, prior)[0], trained)
    with pytest.raises(ValueError, match=r"'moving' or 'online', not 'Option A'"):
        set_statistics(layer, "Option A")


@pytest.mark.parametrize("norm", ["bn", "bkn"])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 4, 6)], ids=["equal", "unequal"])
@pytest.mark.parametrize("which", ["mean", "first"])
def test_precise_statistics_by_hand(which: str, sizes: tuple[int, ...], norm: str) -> None:
    """Mean over all groups of all batches, of different sizes too; modes, momentum and other layers are left alone."""
    layer = NORMS[norm](5, stat_batch=2, moving_unbiased=False, moving_groups=which)
    model = nn.Sequential(nn.Dropout(0.5), layer, Take())
    layer.eval()  # frozen by the user
    batches = [torch.randn(n, 5, 4, 3) + 1 for n in sizes]
    state = torch.get_rng_state()
    precise_statistics(model, batches)
    assert torch.equal(state, torch.get_rng_state())  # no dropout was drawn
    groups = [b[g :: len(b) // 2].transpose(0, 1).flatten(1) for b in batches for g in range(len(b) // 2)]
    expected = [torch.stack(v).mean(0) for v in ([g.mean(1) for g in groups], [g.var(1, correction=0) for g in groups])]
    same(moving(layer), expected, 1e-5)
    assert [m.training for m in model] == [True, False, True] and layer.momentum == 0.1


class Take(nn.Module):
    """The output of a normalizer alone."""

    def forward(self, both: tuple[Tensor, Belief | None]) -> Tensor:
        return both[0]


@pytest.mark.parametrize("batches", [[], [torch.randn(4, 5, 2, 2), torch.randn(3, 5, 2, 2)]], ids=["none", "ragged"])
def test_precise_statistics_that_fail_leave_the_old_ones(batches: list[Tensor]) -> None:
    layer = BatchNorm(5, stat_batch=2)
    layer(torch.randn(4, 5, 2, 2) + 1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="batch"):
        precise_statistics(nn.Sequential(layer), batches)
    assert layer.training and layer.momentum == 0.1
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_precise_statistics_of_what_loaders_give() -> None:
    """(x, y), and named arguments; what gives nothing to measure is refused."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = KalmanBatchNorm2d(4, stat_batch=2)

        def forward(self, image: Tensor) -> Tensor:
            return self.norm(image)

    x, y = 2 * torch.randn(4, 4, 5, 5) + 1, torch.arange(4)
    found = []
    for batches in ([x], [(x, y)], [[x, y]], iter([{"image": x}])):
        net = Net()
        precise_statistics(net, batches)
        found.append(net.norm.running_mean)
    assert found[0].abs().sum() > 1 and all(torch.equal(found[0], other) for other in found)
    with pytest.raises(ValueError, match=r"batches must be several, .* not one Tensor \(4, 4, 5, 5\)"):
        precise_statistics(Net(), x)
    with pytest.raises(
        ValueError, match=r"BatchNorm2d has BatchNorm layers of torch's alone: call kalmannorm\.convert"
    ):
        precise_statistics(nn.BatchNorm2d(4), [x])


@pytest.mark.parametrize("stat_batch", [2, None])
def test_probes_see_every_group(stat_batch: int | None) -> None:
    model = nn.ModuleDict(
        {"bn": BatchNorm(5, stat_batch=stat_batch), "kn": KalmanBatchNorm2d(5, stat_batch=stat_batch)}
    )
    seen: dict[str, list[dict[str, Belief | None]]] = {"bn": [], "kn": []}
    x, prior = torch.randn(6, 5, 4, 3) + 1, random_belief(1, 5)
    unseen = [estimated(layer, x, prior)[0] for layer in model.values()]
    with probing(model, {name: lambda calls=calls, **what: calls.append(what) for name, calls in seen.items()}):
        for layer, y in zip(model.values(), unseen, strict=True):
            same([estimated(layer, x, prior)[0].detach()], [y.detach()], 1e-6)
    posterior = model["kn"](x, beliefs=prior)[1]  # no probe any more
    number = 1 if stat_batch is None else 3
    groups = torch.stack([x[g::number].transpose(0, 1).flatten(1) for g in range(number)])
    for name in ("bn", "kn"):
        (call,) = seen[name]
        used = Belief(groups.mean(2), groups.var(2, correction=0)) if name == "bn" else posterior
        same(list(call["measured"]), [groups.mean(2), groups.var(2, correction=0)], 1e-5)  # type: ignore[arg-type]
        same([t.detach() for t in call["used"]], [t.detach() for t in used], 1e-5)  # type: ignore[union-attr]
        assert all(not t.requires_grad for b in call.values() if b is not None for t in b)  # detached, as promised
    assert seen["bn"][0]["prior"] is None
    expected = [prior.mean, prior.var + 0.02]  # R included
    same([t.detach().expand(1, 5) for t in seen["kn"][0]["prior"]], expected, 1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("norm", quick(["bn", "bkn"], "bn"))
def test_compiled_code_does_not_depend_on_the_number_of_micro_batches(norm: str) -> None:
    """What waits to be averaged in is no part of what a compiler specializes on; the averages are the eager ones."""
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    eager = convert(Perceptron(), norm, stat_batch=2)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend=compiler)
    parts = 4
    for model in (eager, twin):
        spread_batches(model)
    for step in range(2):
        for part in range(parts):
            x = torch.randn(4, 3)
            for model, forward in ((eager, eager), (twin, compiled)):
                place_batch(model, step, part, parts)
                forward(x)
        for model in (eager, twin):
            flush_moving(model)
    assert compiler.frame_count == 1
    for a, b in zip(twin.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b) or error(a, b) < 1e-6
