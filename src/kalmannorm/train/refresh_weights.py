"""When a training's whitened weights are refreshed, and by which samples."""

import torch

from kalmannorm.conversion.flow import beliefs_of_inputs
from kalmannorm.data.batches import Batches, mix
from kalmannorm.experiments.config import Config
from kalmannorm.norm.whitened import refresh
from kalmannorm.train.state import Session

BATCH = 500  # images at a time, over all processes


def refresh_weights(config: Config, session: Session, train: Batches, step: int) -> None:
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
    at_a_time = max(1, BATCH // size) * size
    inputs = None
    if weights.get("covariance") == "predicted":
        pixels = config.budget.size
        inputs = beliefs_of_inputs(session.model, torch.zeros(size, 3, pixels, pixels, device=session.ranks.device))
    refresh(
        session.model,
        (x for x, _, _ in train.plain(at_a_time, images, fill=size)),
        session.optimizer,
        momentum=weights["momentum"],
        generator=torch.Generator().manual_seed(mix(seed, train.rank)),
        inputs=inputs,
    )
