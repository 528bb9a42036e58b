"""Build a detection run's model: Mask R-CNN, converted part by part; its pretrained weights and frozen constants."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from kalmannorm.conversion import belief_report, convert, is_converted
from kalmannorm.data.batches import derive_seed
from kalmannorm.data.coco import TrainingBatches
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.settings import DetectionSchedule, Norm
from kalmannorm.models.detection.c4 import MaskRCNNC4
from kalmannorm.models.detection.fpn import MaskRCNNFPN
from kalmannorm.norm import FrozenBatchNorm
from kalmannorm.norm.modes import normalizers, seed_noise
from kalmannorm.presets import BATCH_STATISTICS, KALMAN
from kalmannorm.train.model import plain_network

DETECTORS: dict[str, Callable[..., nn.Module]] = {"mask_rcnn_c4": MaskRCNNC4, "mask_rcnn_fpn": MaskRCNNFPN}
# The parts of a detector that torch.fx can trace; each is converted on its own.
BODIES = ("body", "backbone.body")  # in C4, in torchvision's FPN models
HEAD, MASK_HEAD = "roi_heads.box_head", "roi_heads.mask_head"
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3")  # frozen_stages = n freezes the first n + 1 of them
BELIEF_ENDS = "roi_align (rows of images become rows of regions; arch.roi_belief=carry hands the belief on)"
BELIEF_ENDS_AT_HEADS = "roi_align (rows of images become rows of regions)"  # in a model with a pyramid
NEEDS_MORE = {"brn": "follows a schedule", "wn": "begins with a pass over data"}
# Training batches from which a frozen normalizer's constants are measured if no pretrained weights provide them.
CONSTANTS_BATCHES = 10


def build(config: Config) -> nn.Module:
    """Build the converted detector, with fresh weights from the seed. UserError: an unknown architecture or option."""
    arch, norm = dict(config.arch.options), config.norm
    frozen_stages, roi_belief = arch.pop("frozen_stages", 0), arch.pop("roi_belief", "end")
    if not isinstance(config.schedule, DetectionSchedule):
        raise UserError(f"schedule {config.schedule.name} is a classifier's: pass schedule=c4_280k")
    if norm.name in NEEDS_MORE:
        raise UserError(f"norm {norm.name} {NEEDS_MORE[norm.name]}, which detection does not have")
    model = plain_network(config, DETECTORS, arch, size=config.budget.size)
    kalman = {"preset": norm.preset, "predictor": norm.predictor} if norm.preset else {}
    try:
        convert_parts(
            model,
            norm.name,
            stat_batch=config.batch.stat_batch,
            carry=roi_belief == "carry",
            head_norm=arch.get("head_norm", "none"),
            **kalman,
            **norm.options,
        )
    except ValueError as error:
        raise UserError(f"norm {norm.name} on {config.arch.name}: {error}") from None
    for number, part in enumerate(converted_parts(model).values()):
        seed_noise(part, derive_seed(config.seed, number))
    for stage in STAGES[: frozen_stages + 1] if frozen_stages else ():
        body(model).get_submodule(stage).requires_grad_(False)
    return model


def body(model: nn.Module) -> nn.Module:
    """Return the part of a detector that sees whole images, before pyramid and regions."""
    return next(part for part in (_part(model, name) for name in BODIES) if part is not None)


def of_images(model: nn.Module) -> nn.Module:
    """Return all parts that see whole images: the body, with the pyramid if there is one."""
    backbone = _part(model, "backbone")
    return body(model) if backbone is None else backbone


def convert_parts(
    model: nn.Module,
    norm: str,
    *,
    stat_batch: int | None = None,
    carry: bool = False,
    head_norm: str = "none",
    **options: Any,
) -> None:
    """Convert in place the parts of a detector that can be traced, in a MaskRCNNC4 or torchvision's FPN models.

    Args:
        model: the detector.
        norm: name of the normalizer.
        stat_batch: images that share statistics; in C4's head, the regions of that many images.
        carry: whether a group's images hand their belief on to their regions. The belief is right for the mean. Its
            variance, that of single cells, is an upper bound: RoIAlign's interpolation lowers the variance where
            neighbouring cells differ.
        head_norm: normalizer of the pyramid and the heads, if a MaskRCNNFPN has normalizers there.
        options: of convert.

    ValueError: as convert; no part with BatchNorm layers; `carry` without a normalizer behind RoIAlign.
    """
    if head_norm != "none":
        _convert_with_heads(model, norm, head_norm, stat_batch, carry, options)
        return
    found = [name for name in (*BODIES, HEAD) if _has_batch_norm(_part(model, name))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no BatchNorm layer in {', '.join((*BODIES, HEAD))}")
    if carry and HEAD not in found:
        raise ValueError("its heads have no normalizer to carry a belief to: pass arch.roi_belief=end")
    carry = carry and norm in KALMAN
    for name in found:
        own: dict[str, Any] = {"stat_batch": stat_batch}
        if name == HEAD:
            if norm in BATCH_STATISTICS and stat_batch is not None:
                own["stat_batch"] = stat_batch * model.roi_heads.boxes  # type: ignore[union-attr, operator]
            if carry:
                own["input_belief"] = "argument"
            model.roi_heads.carries, model.roi_heads.rows_are_images = carry, norm == "gkn"  # type: ignore[union-attr]
        elif carry:
            own["returns_belief"] = True
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, convert(model.get_submodule(name), norm, **own, **options))


def _convert_with_heads(
    model: nn.Module, norm: str, head_norm: str, stat_batch: int | None, carry: bool, options: Mapping[str, Any]
) -> None:
    """Convert body and pyramid together, so that beliefs flow from one to the other, and each head on its own.

    If the normalizer of pyramid and heads is the body's, it gets the same options, else its defaults. A head's
    statistics batch is the regions of one image (fpn.py).
    """
    if carry:
        raise ValueError("beliefs are carried to the regions of a C4 model alone: pass arch.roi_belief=end")
    if head_norm in KALMAN and norm in KALMAN and head_norm != norm:
        raise ValueError(f"arch.head_norm = {head_norm}: the body's beliefs have other rows; expected {norm}")
    if head_norm in KALMAN and options.get("predictor") == "sampling":
        raise ValueError(f"arch.head_norm = {head_norm}: regions are not sampled; pass norm.predictor=closed")
    given = {key: value for key, value in options.items() if key in ("preset", "predictor")}
    norm_options = {key: value for key, value in options.items() if key not in given}
    own = norm_options if head_norm == norm else {}
    backbone = model.get_submodule("backbone")
    choices = {"body.*": (norm, norm_options), "fpn.*": (head_norm, own)}
    model.backbone = convert(backbone, choices, stat_batch=stat_batch, **given)
    for name in (HEAD, MASK_HEAD):
        if _has_batch_norm(_part(model, name)):
            of_head = {**own, **given} if head_norm in KALMAN else own
            setattr(model.roi_heads, name.rpartition(".")[2], convert(model.get_submodule(name), head_norm, **of_head))


def _part(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _has_batch_norm(part: nn.Module | None) -> bool:
    layers = part.modules() if part is not None else ()
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)


def converted_parts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_converted(m)}


def belief_report_of_parts(model: nn.Module) -> dict[str, str | None]:
    """Return the belief reports of all converted parts in one dict."""
    beliefs: dict[str, str | None] = {}
    for part, converted in converted_parts(model).items():
        for name, lost in belief_report(converted).items():
            behind_roi_align = part in (HEAD, MASK_HEAD) and lost is not None and lost.startswith("nothing")
            ends = BELIEF_ENDS if _part(model, "backbone") is None else BELIEF_ENDS_AT_HEADS
            beliefs[f"{part}.{name}"] = ends if behind_roi_align else lost
    return beliefs


# Weights -------------------------------------------------------------------------------------------------------------


def pretrained_parts(model: nn.Module) -> list[nn.Module]:
    """Return the parts that a ResNet-50's weights are loaded into: the body, and C4's conv5."""
    conv5 = _part(model, f"{HEAD}.layer4")
    return [body(model), *([model.get_submodule(HEAD)] if conv5 is not None else [])]


@torch.no_grad()
def measure_constants(model: nn.Module, config: Config, batches: TrainingBatches) -> None:
    """Measure the constants of frozen normalizers, for a run without pretrained weights: means and variances under the
    present weights, averaged over CONSTANTS_BATCHES training batches."""
    norm = Norm(name="bn", preset=None, predictor=None, options={})
    bn_config = replace(config, norm=norm, batch=replace(config.batch, stat_batch=None))
    twin = build(bn_config).to(batches.device)
    constants = ("running_mean", "running_var")
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(constants)}
    twin.load_state_dict(state, strict=False)
    frozen = [name for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm)]
    measured = {name: layer for name, layer in normalizers(twin).items() if name in frozen}
    for layer in measured.values():
        layer.momentum = None  # for BatchNorm, None means a cumulative average
    twin.train()
    for batch in islice(batches.epoch(0), CONSTANTS_BATCHES):
        twin(batch.images, batch.targets, batch.canvas)
    for name, layer in measured.items():
        for key in constants:
            getattr(model.get_submodule(name), key).copy_(getattr(layer, key))
