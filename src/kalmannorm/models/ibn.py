"""Residual blocks with one more Instance Norm, after the addition and before the last ReLU (IBN-Net's placement b)."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from kalmannorm.models.resnet_cifar import Block


class BlockIN(Block):
    """This project's, for 32 x 32 images."""

    IN: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.IN(out + self.shortcut(x)))


class BasicBlockIN(BasicBlock):
    """torchvision's of two convolutions."""

    IN: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.IN(out + shortcut))


class BottleneckIN(Bottleneck):
    """torchvision's of three convolutions."""

    IN: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.IN(out + shortcut))


KINDS: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    Block: (BlockIN, "bn2"),
    BasicBlock: (BasicBlockIN, "bn2"),
    Bottleneck: (BottleneckIN, "bn3"),
}


def normalize_sum(name: str, block: nn.Module) -> None:
    """Give a block an affine Instance Norm, `IN`. ValueError: a block of another class than those of KINDS."""
    if type(block) not in KINDS:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"{name} ({type(block).__name__}): placement ibn_b knows blocks of the classes {known}")
    kind, last = KINDS[type(block)]
    block.IN = nn.InstanceNorm2d(getattr(block, last).num_features, affine=True)
    block.__class__ = kind
