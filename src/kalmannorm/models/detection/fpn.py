"""Define Mask R-CNN with a ResNet-50-FPN backbone: torchvision's maskrcnn_resnet50_fpn, with the same parts and names.

This is the model of Lin et al. 2017 and of the Group Normalization literature; the paper trains C4 (c4.py). Normalizers
are in the backbone's body only, as in torchvision; with `head_norm` also in the pyramid and the heads (the talk, part
3; public code of Switchable Normalization): behind each of the pyramid's eight convolutions, without ReLU, and in heads
of four convolutions, with ReLU. The proposal network has none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from kalmannorm.models.detection.parts import (
    ANCHORS,
    ANCHORS_AT,
    HEADS,
    RATIOS,
    KeyedSampler,
    Transform,
    anchor_sides,
    give_keys,
    in_float32,
    proposal_network,
)
from kalmannorm.models.resnet import Resnet
from kalmannorm.norm.modes import averaging_once

LEVELS = ("0", "1", "2", "3")  # torchvision's names of the pyramid's levels, from layer1 to layer4
CONVOLUTIONS = 4  # in a head
CANONICAL = 224  # side in pixels, at ANCHORS_AT, of a region taken from the third level (Lin et al. 2017)


class MaskRCNNFPN(GeneralizedRCNN):
    """(images, targets) -> losses in training, (images) -> detections in evaluation; arguments as MaskRCNNC4's.

    proposals, candidates: per image and level. Anchors and levels shrink with `size`, as C4's anchors do. head_norm:
    unless "none", pyramid and heads have BatchNorm layers, which convert replaces by the named normalizer. mask_head:
    False makes this Faster R-CNN, whose box head has two linear layers and never a normalizer.
    """

    def __init__(
        self,
        classes: int = 80,
        *,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: float = 1.0,
        size: int = 800,
        max_size: int = 1333,
        boxes: int = 256,
        proposals: Sequence[int] = (2000, 1000),
        candidates: Sequence[int] = (2000, 1000),
        head_norm: str = "none",
        mask_head: bool = True,
    ) -> None:
        resnet = Resnet(layers, width)
        channels, hidden = max(8, round(256 * width)), max(8, round(1024 * width))
        stages = [getattr(resnet, f"layer{number}") for number in (1, 2, 3, 4)]
        outputs = [stage[-1].conv3.out_channels for stage in stages]
        named = {f"layer{number}": level for number, level in zip((1, 2, 3, 4), LEVELS, strict=True)}
        norm_layer = None if head_norm == "none" else nn.BatchNorm2d
        backbone = BackboneWithFPN(resnet, named, outputs, channels, norm_layer=norm_layer)
        anchors = AnchorGenerator(tuple((side,) for side in anchor_sides(size)), (RATIOS,) * len(ANCHORS))
        rpn = proposal_network(channels, anchors, proposals, candidates)
        box_head: nn.Module
        if mask_head and norm_layer:
            box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * CONVOLUTIONS, [hidden], norm_layer)
        else:
            box_head = TwoMLPHead(channels * 7**2, hidden)
        masks: dict[str, Any] = {}
        box_predictor = in_float32(FastRCNNPredictor(hidden, classes + 1))
        if mask_head:
            masks["mask_roi_pool"] = _align(14, size)
            masks["mask_head"] = MaskRCNNHeads(channels, (channels,) * CONVOLUTIONS, 1, norm_layer)
            masks["mask_predictor"] = in_float32(MaskRCNNPredictor(channels, channels, classes + 1))
        heads = _ImageByImage(_align(7, size), box_head, box_predictor, **HEADS, batch_size_per_image=boxes, **masks)
        heads.fg_bg_sampler = KeyedSampler(boxes, 0.25, salt=1)
        super().__init__(backbone, rpn, heads, Transform(size, max_size))

    def forward(  # type: ignore[override]
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None, canvas: tuple[int, int] | None = None
    ) -> Any:
        self.transform.canvas = canvas or (0, 0)
        if targets is not None:
            give_keys(self, targets)
        return super().forward(images, targets)


class _ImageByImage(RoIHeads):
    """torchvision's heads, in training run on one image after the other; the images' losses are averaged.

    In heads without normalizers this changes only the weights of the images in the loss: they are equal. With them,
    batch statistics are those of one image's regions (public code: of all images on the device), so that any number of
    devices computes the same; moving averages are updated once per batch.
    """

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        assert targets is not None
        keys, each = self.fg_bg_sampler.keys, []
        with averaging_once(self):
            for n in range(len(proposals)):
                own, self.fg_bg_sampler.keys = slice(n, n + 1), keys[n : n + 1]
                maps = {level: of_level[own] for level, of_level in features.items()}
                each.append(super().forward(maps, proposals[own], image_shapes[own], targets[own])[1])
        return [], {name: torch.stack([losses[name] for losses in each]).mean() for name in each[0]}


def _align(side: int, size: int) -> MultiScaleRoIAlign:
    """Build RoIAlign over the levels, with given strides: torchvision infers them from the first images, and would be
    wrong if `canvas` is much larger than an image."""
    canonical = max(1, round(CANONICAL * size / ANCHORS_AT))
    pool = MultiScaleRoIAlign(list(LEVELS), side, sampling_ratio=2, canonical_scale=canonical)
    pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool.map_levels = initLevelMapper(2, 5, canonical_scale=canonical, canonical_level=4)
    return pool
