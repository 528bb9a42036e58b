"""Batches that do not divide into groups of stat_batch images: refused, measured apart, or left out."""

import copy
from typing import Any

import pytest
import torch
from helpers import net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalmannorm import NORMS, convert, fold, precise_statistics

BY_GROUPS = ("bn", "brn", "sn", "ssn", "bkn", "syncbn", "pn", "zca", "itern")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def build(norm: str, **options: Any) -> nn.Module:
    options |= {"group": 2} if norm in ("zca", "itern") else {}
    layer = NORMS[norm](4, stat_batch=2, **options)
    layer(torch.randn(4, 4, 5, 5) * 2 + 1)  # moving averages that are not those of the start
    return layer


def state(layer: nn.Module) -> list[Tensor]:
    return [value.clone() for value in layer.buffers()]


@pytest.mark.parametrize("norm", BY_GROUPS)
def test_the_images_that_are_left(norm: str) -> None:
    x = torch.randn(5, 4, 5, 5)
    for ragged in ("measure", "drop"):
        layer = build(norm, ragged=ragged)
        plain = build(norm)
        plain.load_state_dict(layer.state_dict())
        y = layer(x)
        torch.testing.assert_close(y[:4], plain(x[:4]))
        moving, alone = copy.deepcopy(plain).eval(), copy.deepcopy(plain)  # with what the whole groups add to averages
        alone.stat_batch = 1  # type: ignore[assignment]
        torch.testing.assert_close(y[4:], alone(x[4:]) if ragged == "measure" else moving(x[4:]))
        for a, b in zip(state(layer), state(plain), strict=True):  # moving averages are of whole groups
            torch.testing.assert_close(a, b)
        y.sum().backward()
        before = state(layer)
        assert layer(x[:1]).shape == (1, 4, 5, 5)  # no whole group
        changed = [not torch.equal(a, b) for a, b in zip(before, state(layer), strict=True)]
        assert norm == "ssn" or not any(changed)
    with pytest.raises(ValueError, match=r"5 images does not divide into groups of stat_batch = 2; ragged='measure'"):
        build(norm)(x)


@pytest.mark.parametrize(
    "options", [{}, {"predictor": "sampling"}, {"belief": "output"}, {"input_belief": "data"}], ids=str
)
@pytest.mark.parametrize("ragged", ["measure", "drop"])
def test_beliefs_of_the_images_that_are_left(ragged: str, options: dict[str, Any]) -> None:
    """A row of their own: what follows treats them as a batch of one group (`measure`)."""
    model = convert(net(), "bkn", stat_batch=2, ragged=ragged, **options)
    x = torch.randn(4, 3, 8, 8)
    model(x)
    model(torch.randn(7, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if not options:
        twin = convert(net(), "bkn", stat_batch=2)
        twin.load_state_dict(model.state_dict())
        batch = torch.cat([x, torch.randn(1, 3, 8, 8)])
        y = model(batch)
        torch.testing.assert_close(y[:4], twin(x))
        rest = convert(net(), "bkn", stat_batch=1)
        rest.load_state_dict(twin.state_dict())
        torch.testing.assert_close(y[4:], rest.train(ragged == "measure")(batch[4:]))


def test_bad_words_are_refused() -> None:
    with pytest.raises(ValueError, match="ragged must be 'error', 'measure' or 'drop', not 'wrap'"):
        NORMS["bn"](4, ragged="wrap")
    with pytest.raises(ValueError, match="ragged='drop' needs moving statistics"):
        NORMS["bn"](4, ragged="drop", track_running_stats=False)
    with pytest.raises(ValueError, match="ragged: IBN"):
        NORMS["ibn"](4, ragged="drop")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("norm", ["bn", "bkn", "brn", "sn", "zca"])
def test_dropped_images_of_two_forwards_before_one_backward(norm, checkpointed):
    """They are normalized by the moving averages as each forward found them."""

    def run(apart: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = NORMS[norm](4, stat_batch=4, ragged="drop", **({"group": 2} if norm == "zca" else {})).double().train()
        first, second = (torch.randn(5, 4, 6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
        factor = torch.randn(5, 4, 6, 6, dtype=torch.float64)

        def loss(x: torch.Tensor) -> torch.Tensor:
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            return (y**2 * factor).sum()

        if apart:
            loss(first).backward()
            loss(second).backward()
        else:
            (loss(first) + loss(second)).backward()
        return [first.grad, second.grad, layer.weight.grad]

    for together, apart in zip(run(False), run(True), strict=True):
        assert torch.allclose(together, apart, rtol=1e-9, atol=1e-9)


def test_precise_statistics_are_of_whole_groups_alone():
    """A batch without a whole group counts for nothing, also where it comes first."""
    torch.manual_seed(0)
    batches = [torch.randn(1, 3, 5, 5) + 50, torch.randn(4, 3, 5, 5)]
    for norm, options in (("bn", {}), ("zca", {"group": 3})):
        model = nn.Sequential(NORMS[norm](3, stat_batch=4, ragged="measure", **options))
        model[0].running_mean.fill_(100.0)
        precise_statistics(model, batches)
        assert torch.allclose(model[0].running_mean, batches[1].mean((0, 2, 3)), atol=1e-5)
    with pytest.raises(ValueError, match="at least one batch of stat_batch images"):
        precise_statistics(model, batches[:1])


@pytest.mark.parametrize("norm", ["bn", "brn", "pn"])
def test_fold_of_layers_whose_moving_statistics_are_not_the_originals(norm):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12) * 3 + 2
    model = convert(net(), norm, stat_batch=None, track_running_stats=False)
    for _ in range(2):
        model.train()(x)
    assert torch.allclose(fold(model.eval()).eval()(x), model(x), atol=1e-5)
