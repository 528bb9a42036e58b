"""Define the named placements: which normalizer goes to which layer.

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
    """Place normalizers as in IBN-Net a.

    Instance Norm is put on half of the channels of the first normalizer in every residual block of stages 1 to 3; in
    DenseNets, on the last 40 % of the channels in every third dense layer of blocks 1 to 3. All else is Batch Norm.

    `model`: a ResNet with torchvision's names (ResNeXt and SE-ResNet too), also as a segmenter's `backbone`; a
    torchvision DenseNet; or one of this project's post-activation ResNets for CIFAR, where the first two of the three
    stages are taken (ours). ValueError: another network.
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
    """Place normalizers as in IBN-Net b.

    Instance Norm is put in the stem; and a new one, `IN`, is added to `model` itself in the last block of stages 1 and
    2, between the addition and the last ReLU. All else is Batch Norm.

    `model`: a torchvision ResNet; or one of this project's post-activation ResNets for CIFAR, with the stem and the end
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
    """Place ZCA whitening at the first normalizer, as its paper does in ResNets; all else is Batch Norm."""
    return _first("zca", model)


def itern_first(model: nn.Module) -> Placed:
    """Place IterNorm at the first normalizer, as its paper does in ImageNet's ResNets; all else is Batch Norm."""
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
    """Return the choice of every SSN layer of a trained model, as a mapping with which to `convert` the plain model.

    A layer becomes bn, in or ln if mean and variance chose the same, else it stays `ssn`. ValueError: the model has no
    SSN layer, or one that has not chosen yet.
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
    """Return the prefix of a ResNet's layer names: "", or "backbone." in a segmenter; None for another network."""
    for prefix, resnet in (("", model), ("backbone.", getattr(model, "backbone", None))):
        stages = [getattr(resnet, f"layer{i}", None) for i in (1, 2, 3, 4)]
        if all(isinstance(s, nn.Sequential) and all(hasattr(b, "bn1") for b in s) for s in stages):
            return prefix
    return None


def _is_densenet(model: nn.Module) -> bool:
    features = getattr(model, "features", None)
    return isinstance(features, nn.Module) and all(hasattr(features, f"denseblock{i}") for i in (1, 2, 3, 4))
