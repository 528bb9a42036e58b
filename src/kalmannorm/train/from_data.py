"""What a training takes from its data beside gradients: the input's belief, and weights that depend on samples."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kalmannorm.conversion import INPUT_BELIEF
from kalmannorm.conversion.flow import beliefs_of_inputs
from kalmannorm.data.batches import Batches, PlainBatches, mix
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.settings import VideoDataset
from kalmannorm.norm.weight import initialize_weight_norm, is_weight_normalized
from kalmannorm.norm.whitened import refresh
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session

REFRESH_BATCH = 500  # images at a time, over all processes


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


def refresh_weights(config: Config, session: Session, train: PlainBatches, step: int) -> None:
    """Refresh before step number `step` (from 0) of the training, every `every` steps, by `samples` training images
    without augmentation, other ones each time; norm.options.weights has both numbers. With `covariance: predicted`
    post-GWNN's, which depends on no data but in the first layer.

    What is drawn depends on the run's seed and the step alone, so that a resumed training goes on exactly; EigenNet's
    labels on the process as well, so that only the others compute the same on any number of processes.
    """
    weights = config.norm.options.get("weights")
    if not weights or step % weights["every"]:
        return
    seed = mix(config.seed, step)
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
        (x for x, _, _ in train.plain(at_a_time, images, fill=size)),
        session.optimizer,
        momentum=weights["momentum"],
        generator=torch.Generator().manual_seed(mix(seed, train.rank)),
        inputs=inputs,
    )
