"""Evaluation of one set of weights under moving, online and precise statistics."""

import copy
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kalmannorm.data.batches import Batches
from kalmannorm.experiments.record import Evaluation
from kalmannorm.norm.modes import normalizers, precise_statistics, set_statistics, shard_noise, spread_batches
from kalmannorm.train.ranks import Ranks

# Images per evaluation batch, about; online statistics depend on who shares a batch, so it is part of NUMERICS.
EVALUATION_BATCH = 500
# Training batches from which precise statistics are re-estimated.
PRECISE_BATCHES = 200


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Batches, statistics: str, stat_batch: int | None, ranks: Ranks | None = None
) -> Evaluation:
    """Return the accuracy in percent and mean cross-entropy over every image of the split, each counted once.

    A loader that deals the images out needs the `ranks`, all of which return the same.
    """
    fill = stat_batch or 1
    shard_noise(model, (loader.rank, loader.world))
    set_statistics(model, statistics)
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=loader.device)
    loss = torch.zeros((), dtype=torch.float64, device=loader.device)
    images = torch.zeros((), dtype=torch.int64, device=loader.device)
    # A CPU's kernels take as little as half the time on channels_last maps, but those by groups of images.
    fast = torch.channels_last if loader.device.type == "cpu" and statistics == "moving" else torch.preserve_format
    for x, labels, counted in loader.plain(max(1, EVALUATION_BATCH // fill) * fill, fill=fill):
        x = x.to(memory_format=fast)
        logits, labels = model(x)[:counted].float(), labels[:counted]
        correct += (logits.argmax(1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        images += counted
    if ranks is not None and loader.world > 1:
        correct, loss, images = ranks.sum(correct, loss, images)
    mean_loss = loss.item() / images.item()
    # JSON has no NaN: a loss that is not finite is recorded as absent, its accuracy stays.
    return {
        "accuracy": 100 * correct.item() / images.item(),
        "loss": mean_loss if np.isfinite(mean_loss) else None,
        "images": int(images.item()),
    }


def under_both(model: nn.Module, one: Callable[[str], Evaluation]) -> dict[str, Evaluation]:
    """Make `one` evaluation each under moving and online statistics; without batch statistics both are one, made
    once."""
    moving = one("moving")
    return {"moving": moving, "online": one("online") if normalizers(model) else moving}


def precise(model: nn.Module, train: Batches, epoch: int, one: Callable[[nn.Module], Evaluation]) -> Evaluation:
    """Make `one` evaluation by precise statistics (mean of variances), in this process alone.

    From PRECISE_BATCHES training batches with the augmentation of epoch `epoch`. The model stays as it is.
    """
    model = copy.deepcopy(model)
    spread_batches(model, False)
    shard_noise(model, (0, 1))
    if normalizers(model):
        precise_statistics(model, (x for x, _ in islice(train.epoch(epoch), PRECISE_BATCHES)))
    return one(model) | {"batches": min(PRECISE_BATCHES, train.steps_per_epoch), "definition": "mean of variances"}
