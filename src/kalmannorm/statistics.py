"""Which statistics normalize in evaluation: moving averages, the evaluation batch's own (online), or precise ones.

The paper calls moving "Option A" and online "Option B", v1 the other way round: here they have names only.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kalmannorm.belief import Noise
from kalmannorm.norm import GroupedStatistics
from kalmannorm.norm.batch import Probe

STATISTICS = ("moving", "online")


def normalizers(model: nn.Module) -> dict[str, GroupedStatistics]:
    """The normalizers with batch statistics, by name, in order of definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GroupedStatistics)}


def set_statistics(model: nn.Module, statistics: str) -> None:
    """Choose what normalizes in eval mode: `moving` averages, or `online` statistics of groups of the evaluation batch.

    Normalizers without moving statistics (GN, GKN) compute the same under both. ValueError: another word.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be 'moving' or 'online', not {statistics!r}")
    for layer in normalizers(model).values():
        layer.statistics = statistics


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the moving statistics from the given batches of inputs, with the weights as they are.

    Mean over all groups of all batches of what normalizes (KN: the posterior), variances included: the definition
    "mean of variances", not the pooled one. Everything but the normalizers stays in eval mode; the model's modes are
    restored. ValueError: no batch.
    """
    modes = {module: module.training for module in model.modules()}
    layers = normalizers(model).values()
    momenta = {layer: layer.momentum for layer in layers}
    model.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            model(batch)
        if not count:
            raise ValueError("precise statistics need at least one batch")
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training


@contextmanager
def probing(model: nn.Module, probes: dict[str, Probe]) -> Iterator[None]:
    """While it lasts, the named normalizers report every group's statistics to their probe."""
    layers = normalizers(model)
    try:
        for name, probe in probes.items():
            layers[name].probe = probe
        yield
    finally:
        for name in probes:
            layers[name].probe = None


def seed_noise(model: nn.Module, seed: int) -> None:
    """Seed of the sampling predictor's draws."""
    for module in model.modules():
        if isinstance(module, Noise):
            module.seed = seed
