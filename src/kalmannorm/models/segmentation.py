"""Define a network for segmentation: torchvision's fcn_resnet50, with the same parts and names.

It has a ResNet dilated to stride 8, a fully convolutional head on the last stage, and one on the third stage with a
loss of its own (deep supervision). This is the network of the talk's Table 5, except that the second head is a quarter
as wide as its input, there half. torchvision's dropout is left out, as in the talk: what it draws for an image would
depend on the rest of the batch.
"""

from collections.abc import Sequence

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from kalmannorm.models.resnet import Resnet

DROPOUT = 3  # its index in torchvision's heads


class FCNResnet(FCN):
    """Images [N, 3, H, W] -> {"out": scores [N, classes, H, W], "aux": those of the third stage}, at full size.

    layers: blocks in each of the four stages; width: factor on the channels.
    """

    def __init__(self, classes: int = 150, *, layers: Sequence[int] = (3, 4, 6, 3), width: float = 1.0) -> None:
        resnet = Resnet(layers, width, replace_stride_with_dilation=[False, True, True])
        channels = [stage[-1].conv3.out_channels for stage in (resnet.layer3, resnet.layer4)]
        backbone = IntermediateLayerGetter(resnet, {"layer4": "out", "layer3": "aux"})
        super().__init__(backbone, _head(channels[1], classes), _head(channels[0], classes))


def _head(channels: int, classes: int) -> FCNHead:
    head = FCNHead(channels, classes)
    head[DROPOUT] = nn.Identity()
    for layer in head:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return head
