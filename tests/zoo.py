"""What the tests over other people's models share: one model converted in every way, and what must come out."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from helpers import error
from torch import Tensor, nn

from kalmannorm import belief_report, convert, fold

# Kalman Normalization that computes Batch Normalization: the measurement alone, torch's moving variance.
AS_BATCH_NORM: dict[str, Any] = {"gain": 1.0, "learn_gain": False, "noise": False, "moving_unbiased": True}


def tensors(value: Any) -> Iterable[Tensor]:
    """In whatever a model returns."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else () if value is None else value
    return [tensor for one in values for tensor in tensors(one)]


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # dropout, stochastic depth
    return list(tensors(model(x)))


def shake(model: nn.Module) -> None:
    """Affine parameters, and everything that starts at a constant, are no longer those of the start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or parameter.numel() == parameter.shape[0]:
                parameter.add_(0.1 * torch.randn_like(parameter))


def check(model: nn.Module, x: Tensor, tolerance: float = 1e-6) -> tuple[int, int]:
    """All that is asked of a model of somebody else's. The number of normalizers with a prior, and of all.

    x: a batch of at least two images. In float64 where the model is.
    """
    torch.manual_seed(0)
    shake(model)
    original, x = model, x.to(next(model.parameters()).dtype)
    twins = [convert(original.train(mode), "bkn", **AS_BATCH_NORM) for mode in (True, False)]
    for training in (True, False):
        with torch.no_grad():
            expected = run(original.train(training), x)
            for twin in twins:
                found = run(twin.train(training), x)
                assert len(found) == len(expected)
                for a, b in zip(found, expected, strict=True):
                    assert error(a, b) < tolerance
    buffers = dict(original.named_buffers())
    for name, value in twins[0].named_buffers():
        assert name not in buffers or error(value.double(), buffers[name].double()) < tolerance

    model = convert(original, "bkn", stat_batch=2).train()
    del twins
    batch = torch.cat([x, x.flip(3)])
    sum(out.square().mean() for out in run(model, batch)).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    assert all(torch.isfinite(b).all() for b in model.buffers())
    model.zero_grad()
    with torch.no_grad():
        folded = fold(copy.deepcopy(model).eval())
        assert type(folded) is type(original)
        assert list(folded.state_dict()) == list(original.state_dict())
        for a, b in zip(run(folded, x), run(model.eval(), x), strict=True):
            assert error(a, b) < tolerance
    report = belief_report(model, batch)
    return sum(why is None for why in report.values()), len(report)
