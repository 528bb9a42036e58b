"""Settings of all normalizers of a model: statistics in evaluation (moving, online, precise), progress, spread batches.

The paper calls moving statistics "Option A" and online ones "Option B", v1 the other way round: here they have names
only.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.norm import (
    BatchRenorm,
    Estimator,
    GroupedStatistics,
    PopulationNorm,
    SparseSwitchableNorm,
    SyncBatchNorm,
)
from kalmannorm.norm.batch import Probe
from kalmannorm.norm.population import GammaDecay
from kalmannorm.norm.sampling import Noise
from kalmannorm.norm.whitened import whitened_parameters

STATISTICS = ("moving", "online")
SCHEDULED = (BatchRenorm, SparseSwitchableNorm, PopulationNorm)  # normalizers that change with the training's progress


def normalizers(model: nn.Module) -> dict[str, GroupedStatistics]:
    """Return the normalizers with batch statistics by name, in order of definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GroupedStatistics)}


def set_statistics(model: nn.Module, statistics: str) -> None:
    """Choose what normalizes in eval mode: `moving` averages, or `online` statistics of groups of the evaluation batch.

    Normalizers without moving statistics (GN, GKN) compute the same under both. ValueError: any other value.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be 'moving' or 'online', not {statistics!r}")
    for layer in normalizers(model).values():
        layer.statistics = statistics


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate the moving statistics from batches of inputs, with the present weights.

    A batch is the model's input; of a tuple or list (x, y) it is x, and a dict holds the model's keyword arguments.

    The statistics that normalize (KN: the posterior) are averaged over all groups of all batches, variances too: "mean
    of variances", not the pooled variance (whitening takes the pooled covariance). Everything but the normalizers stays
    in eval mode; the model's modes are restored, after an error its buffers too. ValueError: one Tensor; no batch, or
    none with a whole group; a model that was not converted.
    """
    if isinstance(batches, Tensor):
        raise ValueError(f"batches must be several, [x] or a loader, not one Tensor {tuple(batches.shape)}")
    if not normalizers(model) and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has BatchNorm layers of torch's alone: call kalmannorm.convert first")
    modes = {module: module.training for module in model.modules()}
    tracking = [layer for layer in normalizers(model).values() if layer.track_running_stats]
    layers = [layer for layer in tracking if layer.running_mean is not None]
    kept = {layer: (layer.momentum, layer.moving_groups) for layer in layers}
    old = {layer: {key: value.clone() for key, value in layer.named_buffers()} for layer in layers}
    model.eval()
    try:
        for layer in layers:
            layer.moving_groups = "mean"
            layer.begin_precise()
            layer.train()
        seen = dict.fromkeys(layers, 0)  # number of groups so far
        batch = None
        for batch in batches:
            args = [] if isinstance(batch, dict) else [batch[0] if isinstance(batch, list | tuple) else batch]
            named = batch if isinstance(batch, dict) else {}
            images = len(next(iter([*args, *named.values()])))
            for layer in layers:
                new = 1 if layer.stat_batch is None else images // layer.stat_batch
                seen[layer] += new
                layer.momentum = new / max(1, seen[layer])  # every group counts the same
            model(*args, **named)
        if batch is None:
            raise ValueError("precise statistics need at least one batch")
        if not all(seen.values()):
            raise ValueError("precise statistics need at least one batch of stat_batch images")
        for layer in layers:
            layer.end_precise()
    except BaseException:
        for layer, buffers in old.items():
            for key, value in buffers.items():
                getattr(layer, key).copy_(value)
        raise
    finally:
        for layer, (momentum, moving_groups) in kept.items():
            layer.momentum, layer.moving_groups = momentum, moving_groups
        for module, training in modes.items():
            module.training = training


def set_progress(model: nn.Module, fraction: float) -> None:
    """Tell normalizers with a schedule (BRN, SSN, PN) which `fraction` of the training is done, from 0 to 1.

    Call it before every step and before an evaluation; then a resumed training goes on exactly.
    """
    for module in model.modules():
        if isinstance(module, SCHEDULED):
            module.set_progress(fraction)


def spread_batches(model: nn.Module, spread: bool = True) -> None:
    """Tell the normalizers that from now on a batch is spread over processes or micro-batches, or no longer.

    Moving averages then wait for flush_moving, SyncBN's groups span the processes, and the released code's guard
    decides over the groups of all processes.
    """
    for module in model.modules():
        if isinstance(module, GroupedStatistics):
            module.defer_averages(spread)
        if isinstance(module, Estimator | SyncBatchNorm):
            module.spread = spread


@torch.no_grad()
def flush_moving(model: nn.Module) -> None:
    """Make one step of the deferred moving averages, over the groups of all ranks and micro-batches since the last."""
    layers = [layer for layer in normalizers(model).values() if layer.has_pending]
    sums = [layer.pending for layer in layers if layer.pending is not None]
    if sums and dist.is_initialized():
        together = torch.cat(sums)
        dist.all_reduce(together)
        sums = list(together.split([len(s) for s in sums]))
    for layer, total in zip(layers, sums, strict=True):
        layer.average_pending(total)


@contextmanager
def averaging_once(model: nn.Module) -> Iterator[None]:
    """Make all forwards within this context one step of the moving averages, over all of their groups."""
    waiting = [layer for layer in normalizers(model).values() if layer.pending is None]
    for layer in waiting:
        layer.defer_averages(True)
    try:
        yield
        for layer in waiting:
            if layer.has_pending and layer.pending is not None:
                layer.average_pending(layer.pending)
    finally:
        for layer in waiting:
            layer.defer_averages(False)


@torch.no_grad()
def finish_gradients(model: nn.Module) -> None:
    """Add the penalties of gamma decay and whitened weights to the gradients, and clip those of SSN's logits.

    All logits of a model together are clipped to norm 1 (public code). Call it between backward and the optimizer's
    step; for a spread batch, after its last backward.
    """
    decays = [(m, m.decay) for m in model.modules() if isinstance(m, PopulationNorm) and m.decay is not None]
    measured = [decay for _, decay in decays if decay.sums is not None]
    if measured and dist.is_initialized():
        sums = [decay.sums for decay in measured if decay.sums is not None]
        together = torch.cat(sums, 1)
        dist.all_reduce(together)
        for decay, total in zip(measured, together.split([s.shape[1] for s in sums], 1), strict=True):
            decay.sums = total
    for layer, decay in decays:
        decay.penalize(layer.weight)
    for whitening, v in whitened_parameters(model):
        if v.grad is not None and whitening.weight_decay:
            v.grad += whitening.weight_decay * whitening.decay(v)
    logits = [p for m in model.modules() if isinstance(m, SparseSwitchableNorm) for p in (m.mean_weight, m.var_weight)]
    if logits:
        nn.utils.clip_grad_norm_(logits, 1.0)


def shard_noise(model: nn.Module, shard: tuple[int, int]) -> None:
    """Tell the sampling predictor for which part of every batch's groups it draws: (part, number of parts)."""
    for module in model.modules():
        if isinstance(module, Noise):
            module.shard = shard


def place_batch(model: nn.Module, step: int, part: int, parts: int) -> None:
    """Tell the layers which `part` (of `parts`, over processes and micro-batches) of step number `step` comes next.

    The sampling predictor draws by step and group, and the released code's moving averages look at the first group.
    """
    for module in model.modules():
        if isinstance(module, Noise):
            module.step, module.shard = step, (part, parts)
        elif isinstance(module, GroupedStatistics):
            module.holds_first = part == 0
        elif isinstance(module, GammaDecay):
            module.micro_batches = parts // (dist.get_world_size() if dist.is_initialized() else 1)


@contextmanager
def probing(model: nn.Module, probes: dict[str, Probe]) -> Iterator[None]:
    """Report every group's statistics of the named normalizers to their probes, within this context."""
    layers = normalizers(model)
    try:
        for name, probe in probes.items():
            layers[name].probe = probe
        yield
    finally:
        for name in probes:
            layers[name].probe = None


def seed_noise(model: nn.Module, seed: int) -> None:
    """Seed the sampling predictor's draws."""
    for module in model.modules():
        if isinstance(module, Noise):
            module.seed = seed
