"""Define torchvision's bottleneck ResNet at any width, for detectors, segmenters and I3D."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet


class Resnet(ResNet):
    """torchvision's ResNet, with the channels of all stages multiplied by `width`; options are torchvision's."""

    def __init__(self, layers: Sequence[int], width: float, **options: Any) -> None:
        self.factor = width
        super().__init__(Bottleneck, list(layers), **options)
        self.fc = nn.Linear(round(512 * width) * Bottleneck.expansion, 1)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, max(1, round(planes * self.factor)), *args, **kwargs)
