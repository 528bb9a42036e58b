"""Define the small CIFAR Inception of the paper's section 4.3.2: one convolution and three Inception blocks at 16 x 16.

The paper gives only the table of filters. The rest is ours: stem 3x3, stride 2, padding 1; max pooling 3x3, stride 1,
in the pooling branch; the classifier directly on the pooled features ("a fully connected layer with 1,000 output
channels is omitted" can also mean a hidden layer: `hidden=1000`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm.models.resnet_cifar import he_init

# 1x1 | 1x1 -> 3x3 | 1x1 -> 5x5 | pool -> 1x1, for the three blocks (paper 4.3.2)
FILTERS = (
    (64, (96, 128), (16, 32), 32),
    (128, (128, 192), (32, 96), 64),
    (192, (96, 208), (16, 48), 64),
)


class Unit(nn.Sequential):
    """Convolution without bias, BN, ReLU; keeps the size at stride 1."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1, 3x3; 1x1, 5x5; max pooling, 1x1."""

    def __init__(self, c_in: int, b1: int, b3: tuple[int, int], b5: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.b1 = Unit(c_in, b1, 1)
        self.b3 = nn.Sequential(Unit(c_in, b3[0], 1), Unit(b3[0], b3[1], 3))
        self.b5 = nn.Sequential(Unit(c_in, b5[0], 1), Unit(b5[0], b5[1], 5))
        self.pool = Unit(c_in, pool, 1)
        self.channels = b1 + b3[1] + b5[1] + pool

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([self.b1(x), self.b3(x), self.b5(x), self.pool(pooled)], 1)


class InceptionCifar(nn.Module):
    """x [N, 3, 32, 32] -> logits [N, classes]. `width` scales every number of filters, for quick runs."""

    def __init__(self, classes: int = 10, width: float = 1.0, hidden: int = 0) -> None:
        super().__init__()

        def w(filters: int) -> int:
            return max(1, round(filters * width))

        self.stem = Unit(3, w(32), 3, stride=2)
        blocks: list[Inception] = []
        channels = w(32)
        for b1, b3, b5, pool in FILTERS:
            blocks.append(Inception(channels, w(b1), (w(b3[0]), w(b3[1])), (w(b5[0]), w(b5[1])), w(pool)))
            channels = blocks[-1].channels
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or channels, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(self.hidden(x))
