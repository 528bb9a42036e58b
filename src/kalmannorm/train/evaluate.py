"""Evaluate a classifier under moving, online and precise statistics."""

import copy
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kalmannorm.data.batches import Batches, EvaluationBatches
from kalmannorm.experiments.record import Evaluation
from kalmannorm.norm.modes import normalizers, precise_statistics, set_statistics, shard_noise, spread_batches
from kalmannorm.train.ranks import Ranks

# Training batches from which precise statistics are re-estimated.
PRECISE_BATCHES = 200


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvaluationBatches, statistics: str, stat_batch: int | None, ranks: Ranks | None = None
) -> Evaluation:
    """Return accuracy in percent and mean cross-entropy over the images of the split, each counted once.

    If the loader deals images out to processes, pass `ranks`; all of them return the same. If it gives several views of
    each image, [n, views, ...], the mean of the views' softmax is the prediction, and `top5` is added: how often, in
    percent, the label is among the five best.
    """
    fill = stat_batch or 1
    shard_noise(model, (loader.rank, loader.world))
    set_statistics(model, statistics)
    model.eval()
    correct, among, images = (torch.zeros((), dtype=torch.int64, device=loader.device) for _ in range(3))
    loss = torch.zeros((), dtype=torch.float64, device=loader.device)
    # On a CPU, channels_last can halve the time, but not with statistics by groups of images.
    fast = torch.channels_last if loader.device.type == "cpu" and statistics == "moving" else torch.preserve_format
    for x, labels, counted in loader.unaugmented(max(1, loader.at_once // fill) * fill, fill=fill):
        if loader.views is None:
            found = model(x.to(memory_format=fast) if x.dim() == 4 else x)
        else:
            found = torch.stack([model(view).float().softmax(1) for view in x.unbind(1)]).mean(0).log()
        logits, labels = found[:counted].float(), labels[:counted]
        correct += (logits.argmax(1) == labels).sum()
        if loader.views:
            among += (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        images += counted
    if ranks is not None and loader.world > 1:
        correct, among, loss, images = ranks.sum(correct, among, loss, images)
    mean_loss = loss.item() / images.item()
    # JSON has no NaN: a loss that is not finite is recorded as None; the accuracy stays.
    top5: Evaluation = {"top5": 100 * among.item() / images.item()} if loader.views else {}
    return top5 | {
        "accuracy": 100 * correct.item() / images.item(),
        "loss": mean_loss if np.isfinite(mean_loss) else None,
        "images": int(images.item()),
    }


def precise(model: nn.Module, train: Batches, epoch: int, one: Callable[[nn.Module], Evaluation]) -> Evaluation:
    """Return one(copy of the model) under precise statistics (the mean of variances), in this process alone.

    They are measured on PRECISE_BATCHES training batches with the augmentation of epoch `epoch`. The model itself is
    not changed.
    """
    model = copy.deepcopy(model)
    spread_batches(model, False)
    shard_noise(model, (0, 1))
    if normalizers(model):
        precise_statistics(model, (x for x, _ in islice(train.epoch(epoch), PRECISE_BATCHES)))
    return one(model) | {"batches": min(PRECISE_BATCHES, train.steps_per_epoch), "definition": "mean of variances"}
