"""Which normalizer stands where: the placements that have names.

PLACEMENTS[name](model) is the mapping of layer patterns to normalizers that `convert` takes (mapping.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.models.resnet_cifar import ResNet as CifarResNet
from kalmannorm.norm import SparseSwitchableNorm

Placed = dict[str, str | tuple[str, Mapping[str, Any]]]


def ibn_a(model: nn.Module) -> Placed:
    """Place as IBN-Net a: Instance Norm on half of the channels of the first normalizer of every residual block of
    the stages 1 to 3 (of DenseNets: of every third dense layer of the blocks 1 to 3, on 40 % of its channels, the last
    ones); all else is Batch Norm.

    `model`: a ResNet with torchvision's names (ResNeXt, SE-ResNet as well), also as a segmenter's `backbone`, a
    DenseNet of torchvision's, or one of this project's post-activation ResNets for CIFAR, of whose three stages it
    takes two (ours). ValueError: another network.
    """
    if (resnet := _resnet(model)) is not None:
        return {f"{resnet}layer[1-3].*.bn1": "ibn", "*": "bn"}
    if _is_densenet(model):
        names = [
            f"features.denseblock{block}.{name}.norm1"
            for block in (1, 2, 3)
            for i, (name, _) in enumerate(model.get_submodule(f"features.denseblock{block}").named_children())
            if i % 3 == 0
        ]
        return {**dict.fromkeys(names, ("ibn", {"ratio": 0.4, "first": "bn"})), "*": "bn"}
    if isinstance(model, CifarResNet) and not model.preact:
        return {**{f"blocks.{i}.bn1": "ibn" for i in range(len(model.blocks) * 2 // 3)}, "*": "bn"}
    raise ValueError(f"{type(model).__name__}: placement ibn_a knows {_KNOWN}")


def ibn_b(model: nn.Module) -> Placed:
    """Place as IBN-Net b: Instance Norm in the stem, and a new one, `IN`, after the addition and before the last
    ReLU of the last block of the stages 1 and 2; all else is Batch Norm. The new layers are added to `model` itself.

    `model`: a ResNet of torchvision's, or one of this project's post-activation ResNets for CIFAR: the stem and the end
    of stage 1 (ours). ValueError: another network.
    """
    if (resnet := _resnet(model)) is not None:
        stages = (f"{resnet}layer{stage}" for stage in (1, 2))
        last = [f"{stage}.{len(model.get_submodule(stage)) - 1}" for stage in stages]  # type: ignore[arg-type]
        stem = f"{resnet}bn1"
    elif isinstance(model, CifarResNet) and not model.preact:
        last, stem = [f"blocks.{len(model.blocks) // 3 - 1}"], "bn"
    else:
        raise ValueError(f"{type(model).__name__}: placement ibn_b knows ResNets of torchvision's and those for CIFAR")
    from kalmannorm.models.ibn import normalize_sum  # torchvision is slow to import, and most runs do without

    for name in last:
        normalize_sum(name, model.get_submodule(name))
    return {stem: "in", "*": "bn"}


def zca_first(model: nn.Module) -> Placed:
    """Place ZCA whitening at the first normalizer, as in its ResNets for CIFAR and ImageNet; all else is Batch Norm."""
    return _first("zca", model)


def itern_first(model: nn.Module) -> Placed:
    """Place IterNorm at the first normalizer, as in its ResNets for ImageNet; all else is Batch Norm."""
    return _first("itern", model)


def _first(norm: str, model: nn.Module) -> Placed:
    first = next((name for name, m in model.named_modules() if isinstance(m, _BatchNorm)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no BatchNorm layer")
    return {first: norm, "*": "bn"}


PLACEMENTS: dict[str, Callable[[nn.Module], Placed]] = {
    "ibn_a": ibn_a,
    "ibn_b": ibn_b,
    "zca_first": zca_first,
    "itern_first": itern_first,
}

_KNOWN = "ResNets with torchvision's names, DenseNets of torchvision's and this project's post-activation ResNets"


def choices(model: nn.Module) -> Placed:
    """Return what every SSN layer of a trained model has chosen, as a mapping for `convert` of the plain model: bn, in
    or ln where mean and variance chose the same, else `ssn`, as it is.

    ValueError: a model without SSN, or with a layer that has not chosen yet.
    """
    found: Placed = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseSwitchableNorm):
            mean, var = layer.chosen
            if mean is None or var is None:
                raise ValueError(f"{name} has not chosen yet: SSN has after 82 % of a training")
            found[name] = mean if mean == var else "ssn"
    if not found:
        raise ValueError(f"{type(model).__name__} has no SSN layer")
    return found


def _resnet(model: nn.Module) -> str | None:
    """Return what the names of a ResNet's layers begin with: nothing, or `backbone.` in a segmenter; None in others."""
    for prefix, resnet in (("", model), ("backbone.", getattr(model, "backbone", None))):
        stages = [getattr(resnet, f"layer{i}", None) for i in (1, 2, 3, 4)]
        if all(isinstance(s, nn.Sequential) and all(hasattr(b, "bn1") for b in s) for s in stages):
            return prefix
    return None


def _is_densenet(model: nn.Module) -> bool:
    features = getattr(model, "features", None)
    return isinstance(features, nn.Module) and all(hasattr(features, f"denseblock{i}") for i in (1, 2, 3, 4))
