"""Define SE-ResNet (Hu et al. 2018) on torchvision's ResNet, for the talk's Table 2."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet


class SqueezeExcitation(nn.Module):
    """x * sigmoid(W2 relu(W1 mean of x over its pixels)), linear layers without bias, reduction 16."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 16
        layers = nn.Linear(channels, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, channels, bias=False)
        self.fc = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class SEBottleneck(Bottleneck):
    """torchvision's bottleneck with squeeze-and-excitation between its last normalizer and the addition."""

    def __init__(self, inplanes: int, planes: int, *args: object, **options: object) -> None:
        super().__init__(inplanes, planes, *args, **options)  # type: ignore[arg-type]
        self.se = SqueezeExcitation(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.se(self.bn3(self.conv3(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


def se_resnet101(classes: int = 1000) -> ResNet:
    """Build SE-ResNet-101, with 49,292,328 parameters at 1000 classes."""
    return ResNet(SEBottleneck, [3, 4, 23, 3], num_classes=classes)
