"""Measure on the training data: the belief of the model's input, and weights that depend on samples (WN, whitening)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kalmannorm.conversion import INPUT_BELIEF
from kalmannorm.conversion.flow import beliefs_of_inputs
from kalmannorm.data.batches import Batches, EvaluationBatches, derive_seed
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.settings import VideoDataset
from kalmannorm.norm.weight import initialize_weight_norm, is_weight_normalized
from kalmannorm.norm.whitened import refresh
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session

REFRESH_BATCH = 500  # images at a time, over all processes


@torch.no_grad()
def measure_input(model: nn.Module, images: Iterable[Tensor], ranks: Ranks) -> None:
    """Measure the belief of the model's input, if it has one (norm.options.input_belief = data); else do nothing.

    It is the mean and variance of each channel over all pixels of the training images, preprocessed as for evaluation
    (no crops, no flips): the paper's "mean of the whole data set" (3.3). `images`: batches [N, 3, ...] of this
    process's share. The result is the same on every process.
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
    """Initialize weight normalization, if the model has it, on the first training batch. For fresh runs only."""
    if any(is_weight_normalized(module) for module in model.modules()):
        x, _ = next(train.epoch(0))
        initialize_weight_norm(model.train(), x)


def refresh_weights(config: Config, session: Session, train: EvaluationBatches, step: int) -> None:
    """Refresh whitened weights before step number `step` (from 0), if it is a multiple of `every`.

    They are measured on `samples` training images without augmentation, drawn anew each time; norm.options.weights has
    both numbers. With `covariance: predicted` post-GWNN takes its covariances from beliefs instead, and only the first
    layer's from data.

    Draws depend on the run's seed and the step alone, so that a resumed training continues exactly. EigenNet's sampled
    labels also depend on the process: unlike the others, it is not the same on any number of processes.
    """
    weights = config.norm.options.get("weights")
    if not weights or step % weights["every"]:
        return
    seed = derive_seed(config.seed, step)
    images = torch.randperm(train.count, generator=torch.Generator().manual_seed(seed))[: weights["samples"]]
    size = config.batch.stat_batch or 1
    at_a_time = max(1, REFRESH_BATCH // size) * size
    inputs = None
    if weights.get("covariance") == "predicted":
        dataset, pixels = config.dataset, config.budget.size
        frames = (dataset.frames,) if isinstance(dataset, VideoDataset) else ()
        blank = torch.zeros(size, 3, *frames, pixels, pixels, device=session.ranks.device)
        inputs = beliefs_of_inputs(session.model, blank)
    refresh(
        session.model,
        (x for x, _, _ in train.unaugmented(at_a_time, images, fill=size)),
        session.optimizer,
        momentum=weights["momentum"],
        generator=torch.Generator().manual_seed(derive_seed(seed, train.rank)),
        inputs=inputs,
    )
