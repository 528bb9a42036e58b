"""What a checkpoint brings back."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kalmannorm.experiments.config import compose
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session


def draw() -> list[float]:
    """From every generator that a model or data set of one's own may use."""
    return [torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """A run that goes on after a kill draws what it would have drawn."""
    model = nn.Linear(2, 2)
    session = Session("run", tmp_path, model, torch.optim.SGD(model.parameters(), 0.1), Ranks(compose(["device=cpu"])))
    draw()
    session.save()
    expected = draw()
    draw()
    session.restore()
    assert draw() == expected
