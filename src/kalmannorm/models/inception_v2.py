"""Define Inception-v2, that is BN-Inception (Ioffe & Szegedy 2015), for 224 x 224 images.

The layout is the one in common use since the Caffe version: pool projections of 128 in blocks 4c and 4d (the paper's
table has 96), a plain 7x7 stem (the paper's is depthwise separable). With convolutions without bias it has 11,285,224
parameters at 1000 classes: the 11.29 M of Kalman Normalization's Table 2, which 96 would miss (11,194,984).

Ours, where the sources are silent: no auxiliary classifiers (the 11.29 M leave no room for them) and no dropout (the
BN-Inception paper removes it); He initialization as everywhere here; pooling is padded by 1, so that its maps are as
large as those of the convolutions beside it at every resolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm.models.inception_cifar import Unit
from kalmannorm.models.resnet_cifar import he_init

# 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 -> 3x3 | pool -> 1x1. A block without the first 1x1 (0) has stride 2, and no convolution
# after the pooling.
BLOCKS: dict[str, tuple[int, tuple[int, int], tuple[int, int], str, int]] = {
    "3a": (64, (64, 64), (64, 96), "avg", 32),
    "3b": (64, (64, 96), (64, 96), "avg", 64),
    "3c": (0, (128, 160), (64, 96), "max", 0),
    "4a": (224, (64, 96), (96, 128), "avg", 128),
    "4b": (192, (96, 128), (96, 128), "avg", 128),
    "4c": (160, (128, 160), (128, 160), "avg", 128),
    "4d": (96, (128, 192), (160, 192), "avg", 128),
    "4e": (0, (128, 192), (192, 256), "max", 0),
    "5a": (352, (192, 320), (160, 224), "avg", 128),
    "5b": (352, (192, 320), (192, 224), "max", 128),
}


class Inception(nn.Module):
    """Branches side by side: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; pooling, 1x1. With b1 = 0 only the last three, at stride 2,
    and no convolution after the pooling."""

    def __init__(self, c_in: int, b1: int, b3: tuple[int, int], b33: tuple[int, int], pooling: str, pool: int) -> None:
        super().__init__()
        self.stride, self.pooling = (1, pooling) if b1 else (2, pooling)
        self.b1 = Unit(c_in, b1, 1) if b1 else None
        self.b3 = nn.Sequential(Unit(c_in, b3[0], 1), Unit(b3[0], b3[1], 3, self.stride))
        self.b33 = nn.Sequential(Unit(c_in, b33[0], 1), Unit(b33[0], b33[1], 3), Unit(b33[1], b33[1], 3, self.stride))
        self.pool = Unit(c_in, pool, 1) if b1 else nn.Identity()
        self.channels = b1 + b3[1] + b33[1] + (pool if b1 else c_in)

    def forward(self, x: Tensor) -> Tensor:
        pool = F.avg_pool2d if self.pooling == "avg" else F.max_pool2d
        first = [] if self.b1 is None else [self.b1(x)]
        return torch.cat([*first, self.b3(x), self.b33(x), self.pool(pool(x, 3, self.stride, 1))], 1)


class InceptionV2(nn.Module):
    """x [N, 3, H, W] -> logits [N, classes]; the maps are H / 32 at the end. `width` scales every number of filters."""

    def __init__(self, classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()

        def w(filters: int) -> int:
            return max(1, round(filters * width)) if filters else 0

        self.conv1 = Unit(3, w(64), 7, stride=2)
        self.reduce2, self.conv2 = Unit(w(64), w(64), 1), Unit(w(64), w(192), 3)
        self.blocks = nn.ModuleDict()
        channels = w(192)
        for name, (b1, b3, b33, pooling, pool) in BLOCKS.items():
            block = Inception(channels, w(b1), (w(b3[0]), w(b3[1])), (w(b33[0]), w(b33[1])), pooling, w(pool))
            self.blocks[name] = block
            channels = block.channels
        self.fc = nn.Linear(channels, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = F.max_pool2d(self.conv2(self.reduce2(x)), 3, 2, 1)
        for block in self.blocks.values():
            x = block(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
