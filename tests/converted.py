"""A small network, its conversions by every variant of Kalman Normalization, and how many priors they have."""

from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm import belief_report, convert

OPTIONS: list[dict[str, Any]] = [
    {},
    {"predictor": "sampling"},
    {"input_belief": "data"},
    {"transition": "learned"},
    {"preset": "released"},
]


class Net(nn.Module):
    """A block with a shortcut, between a stem and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        self.last, self.norm = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(self.last(x + self.block(x))))


def converted(**options: Any) -> nn.Module:
    return convert(Net(), "bkn", stat_batch=2, **options)


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


def priors(model: nn.Module, x: Tensor) -> int:
    return sum(why is None for why in belief_report(model, x).values())
