"""What a training takes from its data before the first step: the input's belief, and weights that depend on data."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kalmannorm.conversion import INPUT_BELIEF
from kalmannorm.data.batches import Batches
from kalmannorm.norm.weight import initialize_weight_norm, is_weight_normalized
from kalmannorm.train.ranks import Ranks


@torch.no_grad()
def measure_input(model: nn.Module, images: Iterable[Tensor], ranks: Ranks) -> None:
    """Fill the model's input belief, if it has one (norm.options.input_belief = data); else `images` are not looked at.

    Mean and variance of each channel over all pixels of the training images, preprocessed as for evaluation (no crops,
    no flips): the paper's "mean of the whole data set" (3.3). `images`: this process's part of them, [N, 3, ...] at a
    time. The result is the same on every process.
    """
    if not hasattr(model, INPUT_BELIEF[0]):
        return
    sums = torch.zeros(3, 3, dtype=torch.float64, device=ranks.device)
    for x in images:
        wide = x.double().transpose(0, 1).flatten(1)
        sums += torch.stack((wide.sum(1), wide.square().sum(1), torch.full_like(sums[2], wide.shape[1])))
    total, squares, count = ranks.sum(*sums)
    # The mean is close to 0 after preprocessing: E[x^2] - E[x]^2 in float64 does not cancel.
    mean, square = total / count, squares / count
    for name, value in zip(INPUT_BELIEF, (mean, square - mean.square()), strict=True):
        model.get_buffer(name).copy_(value)


def initialize(model: nn.Module, train: Batches) -> None:
    """Initialize WN by data: the whole first training batch. Only for a training that starts."""
    if any(is_weight_normalized(module) for module in model.modules()):
        x, _ = next(train.epoch(0))
        initialize_weight_norm(model.train(), x)
