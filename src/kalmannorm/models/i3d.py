"""Define I3D (Carreira & Zisserman 2017), a ResNet-50 inflated from torchvision's: the network of the talk's Table 6.

Clips [N, 3, frames, H, W] -> logits. The parts are torchvision's, with the same names, so that ImageNet weights fit
(inflate_weights). Temporal kernels and strides are those of the public code of Non-local Networks (Wang et al. 2018;
facebookresearch/video-nonlocal-net, resnet_video_org.py); but its poolings are over 2 frames, without padding, and here
over 3, as the paper's table has them (from memory).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kalmannorm.models.resnet import Resnet

STEM, BLOCK = 5, 3  # depth in frames of the stem's kernel, and of the first kernel in some blocks


class I3D(Resnet):
    """torchvision's bottleneck ResNet with time as a third dimension.

    layers, width: as in Resnet. strides: in time, of the stem, the pooling after it, and the pooling after stage 1.
    dropout: before the classifier; it draws from torch's global generator, so that k processes draw other numbers than
    one process.
    """

    def __init__(
        self,
        classes: int = 400,
        *,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: float = 1.0,
        strides: Sequence[int] = (2, 2, 2),
        dropout: float = 0.5,
    ) -> None:
        super().__init__(layers, width)
        self.fc = nn.Linear(self.fc.in_features, classes)
        _inflate(self)
        self.conv1: nn.Module = _convolution(self.conv1, STEM, strides[0])
        self.maxpool = nn.MaxPool3d(3, (strides[1], 2, 2), 1)
        # All blocks of the first stage; the middle one of the last stage's three.
        last = self.layer4[len(self.layer4) // 2 :: 2]
        for block in (*self.layer1, *self.layer2[::2], *self.layer3[::2], *last):
            block.conv1 = _convolution(block.conv1, BLOCK, 1)
        self.layer1.append(nn.MaxPool3d((3, 1, 1), (strides[2], 1, 1), (1, 0, 0)))
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Dropout(dropout))


def _inflate(model: nn.Module) -> None:
    """Replace 2D convolutions and BatchNorm layers by 3D ones, one frame deep."""
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(model, name, _convolution(child, 1, 1))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.BatchNorm3d(child.num_features))
        else:
            _inflate(child)


def _convolution(flat: Any, depth: int, stride: int) -> nn.Conv3d:
    """Build a convolution over `depth` frames with the response of `flat` (2D, or 3D of depth 1) to a still clip."""
    (*_, height, width), (*_, down, across) = flat.kernel_size, flat.stride
    *_, above, beside = flat.padding
    deep = nn.Conv3d(
        flat.in_channels,
        flat.out_channels,
        (depth, height, width),
        (stride, down, across),
        (depth // 2, int(above), int(beside)),
        bias=False,
    )
    weight = flat.weight if flat.weight.dim() == 4 else flat.weight.sum(2)
    deep.weight = nn.Parameter(_deepened(weight.detach(), depth))
    return deep


def _deepened(weight: Tensor, depth: int) -> Tensor:
    return (weight[:, :, None] / depth).expand(-1, -1, depth, -1, -1).clone()


def inflate_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a 2D ResNet's weights for `model`: kernels are repeated over the frames and divided by their number."""
    deep = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor) and value.dim() == 5}
    return {
        key: _deepened(value, deep[key].shape[2]) if key in deep and value.dim() == 4 else value
        for key, value in weights.items()
    }
