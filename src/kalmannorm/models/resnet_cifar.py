"""ResNets for 32 x 32 images: three stages of n blocks with 16, 32 and 64 channels (He et al. 2015, section 4.2).

Two forms, both with parameter-free shortcuts: the standard post-activation one (paper 4.3.1 cites it), and the released
code's pre-activation one ("identity mappings"). ResNet-32 is n = 5, ResNet-110 n = 18.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


def he_init(model: nn.Module) -> None:
    """Initialize all convolutions as in He et al., by fan-out (as the released code does)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Block(nn.Module):
    """3x3, BN, ReLU, 3x3, BN, + shortcut, ReLU. A shortcut to more channels is subsampled, with zero channels added."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.stride, self.extra = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if not self.extra:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class PreactBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, + shortcut of the raw input. The first block's input is activated already.

    A shortcut to more channels: 2x2 average pooling, and half of the zero channels on each side (released code).
    """

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool) -> None:
        super().__init__()
        self.bn1 = nn.Identity() if first else nn.BatchNorm2d(c_in)
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), conv3x3(c_out, c_out)
        self.first, self.extra = first, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.first else F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        if self.extra:
            x = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return out + x


class ResNet(nn.Module):
    """x [N, 3, H, W] -> logits [N, classes]; depth 6 n + 2. `dropout`: probability, on the pooled features."""

    def __init__(self, n: int, classes: int = 10, preact: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.preact = preact
        self.conv, self.bn = conv3x3(3, 16), nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, width in enumerate((16, 32, 64)):
            for i in range(n):
                stride = 2 if stage and i == 0 else 1
                blocks.append(
                    PreactBlock(channels, width, stride, first=not blocks) if preact else Block(channels, width, stride)
                )
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.bn_last = nn.BatchNorm2d(64) if preact else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc = nn.Linear(64, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        if self.preact:
            x = F.relu(self.bn_last(x))
        return self.fc(self.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
