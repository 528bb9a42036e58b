"""Evaluation on few images."""

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.data.loader import Loader
from kalmannorm.train.evaluate import evaluate
from kalmannorm.train.ranks import Ranks


class Two(Ranks):
    """The second of two processes, by what the first one's sums are."""

    def __init__(self, others: list[Tensor]) -> None:
        self.others = others

    def sum(self, *values: Tensor) -> list[Tensor]:
        own, self.others = self.others, list(values)
        return [a.double() + b.double() for a, b in zip(own, values, strict=True)] if own else list(values)


def test_a_process_without_an_image_returns_what_the_other_does() -> None:
    """Three images are one group of four, which the first of two processes has."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    labels = np.array([0, 1, 1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    first, second = (Loader(images, labels, batch=4, device="cpu", shard=(rank, 2)) for rank in (0, 1))
    ranks = Two([])
    expected = evaluate(model, first, "moving", 4, ranks)
    assert expected["images"] == 3
    assert evaluate(model, second, "moving", 4, ranks) == expected
