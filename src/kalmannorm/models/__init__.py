"""Architectures: plain PyTorch with plain BatchNorm layers; `kalmannorm.convert` puts the normalizer in.

ARCHS[name](classes=..., **options) builds one with fresh weights from torch's global generator. `last_normalizers`
of a model names those between its last convolution and the global pooling (Figure 5 draws them).
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from kalmannorm.models.inception_cifar import InceptionCifar
from kalmannorm.models.resnet_cifar import ResNet

ARCHS: dict[str, Callable[..., nn.Module]] = {
    "inception_cifar": InceptionCifar,
    "resnet14": partial(ResNet, 2),
    "resnet14_preact": partial(ResNet, 2, preact=True),
    "resnet32": partial(ResNet, 5),
    "resnet32_preact": partial(ResNet, 5, preact=True),
    "resnet110": partial(ResNet, 18),
    "resnet110_preact": partial(ResNet, 18, preact=True),
}
