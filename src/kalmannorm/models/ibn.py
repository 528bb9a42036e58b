"""Define residual blocks with an Instance Norm between the addition and the last ReLU (IBN-Net's placement b)."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from kalmannorm.models.resnet_cifar import Block


class BlockIN(Block):
    """This project's block for 32 x 32 images, with `IN`."""

    IN: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.IN(out + self.shortcut(x)))


class BasicBlockIN(BasicBlock):
    """torchvision's block of two convolutions, with `IN`."""

    IN: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.IN(out + shortcut))


class BottleneckIN(Bottleneck):
    """torchvision's block of three convolutions, with `IN`."""

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
    """Add an affine Instance Norm, `IN`, to a block, in place. ValueError: the block's class is not in KINDS."""
    if type(block) not in KINDS:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"{name} ({type(block).__name__}): placement ibn_b knows blocks of the classes {known}")
    kind, last = KINDS[type(block)]
    block.IN = nn.InstanceNorm2d(getattr(block, last).num_features, affine=True)
    block.__class__ = kind
