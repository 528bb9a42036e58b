"""List the architectures: plain PyTorch with BatchNorm layers, which `kalmannorm.convert` replaces.

ARCHS[name](classes=..., **options) builds one with fresh weights from torch's global generator. LAST_NORMALIZERS[name]
names its normalizers between the last convolution and the global pooling (drawn in Figure 5); it is kept here, since
torchvision's models have no place for it.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from kalmannorm.models.inception_cifar import InceptionCifar
from kalmannorm.models.inception_v2 import InceptionV2
from kalmannorm.models.resnet_cifar import ResNet, conv3x3, he_init


def _torchvision(name: str, classes: int = 1000, **options: Any) -> nn.Module:
    """Build torchvision's model, unchanged and without pretrained weights; the options are torchvision's."""
    import torchvision  # slow to import, and most runs do without

    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)


def _resnet18_cifar(classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """Build torchvision's ResNet-18 for images of 32 pixels: a 3x3 stem with stride 1, and no pooling after it.

    `dropout`: probability, on the pooled features.
    """
    model = _torchvision("resnet18", classes)
    model.conv1 = conv3x3(3, 64)
    he_init(model.conv1)
    model.maxpool = nn.Identity()
    if dropout:
        model.fc = nn.Sequential(nn.Dropout(dropout), model.get_submodule("fc"))
    return model


def _of(module: str, name: str, **options: Any) -> nn.Module:
    """Build a network from a module that is imported only now, since it imports torchvision."""
    return getattr(import_module(f"kalmannorm.models.{module}"), name)(**options)


# Constructors, and the names of the last normalizers.
_NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "inception_cifar": (InceptionCifar, tuple(f"blocks.2.{unit}.bn" for unit in ("b1", "b3.1", "b5.1", "pool"))),
    "inception_v2": (InceptionV2, tuple(f"blocks.5b.{unit}.bn" for unit in ("b1", "b3.1", "b33.2", "pool"))),
    "resnet14": (partial(ResNet, 2), ("blocks.5.bn2",)),
    "resnet14_preact": (partial(ResNet, 2, preact=True), ("bn_last",)),
    "resnet32": (partial(ResNet, 5), ("blocks.14.bn2",)),
    "resnet32_preact": (partial(ResNet, 5, preact=True), ("bn_last",)),
    "resnet110": (partial(ResNet, 18), ("blocks.53.bn2",)),
    "resnet110_preact": (partial(ResNet, 18, preact=True), ("bn_last",)),
    "resnet18_cifar": (_resnet18_cifar, ("layer4.1.bn2",)),
    "resnet50": (partial(_torchvision, "resnet50"), ("layer4.2.bn3",)),
    "resnet101": (partial(_torchvision, "resnet101"), ("layer4.2.bn3",)),
    "densenet121": (partial(_torchvision, "densenet121"), ("features.norm5",)),
    "densenet169": (partial(_torchvision, "densenet169"), ("features.norm5",)),
    # Xie et al. 2017: 44,177,704 parameters at 1000 classes.
    "resnext101_32x4d": (partial(_torchvision, "resnet101", groups=32, width_per_group=4), ("layer4.2.bn3",)),
    "se_resnet101": (partial(_of, "se_resnet", "se_resnet101"), ("layer4.2.bn3",)),
    "i3d_resnet50": (partial(_of, "i3d", "I3D"), ("layer4.2.bn3",)),
    "i3d_small": (partial(_of, "i3d", "I3D"), ("layer4.0.bn3",)),
}
ARCHS = {name: build for name, (build, _) in _NETWORKS.items()}
LAST_NORMALIZERS = {name: last for name, (_, last) in _NETWORKS.items()}

# Networks for segmentation: they return scores [N, classes, H, W] as "out", and those for deep supervision as "aux".
SEGMENTERS: dict[str, Callable[..., nn.Module]] = dict.fromkeys(
    ("fcn_resnet50", "fcn_resnet14"), partial(_of, "segmentation", "FCNResnet")
)
