"""Define Mask R-CNN with a ResNet-50 conv4 backbone (C4): RoI features go through conv5, shared by boxes and masks.

This is the network of He et al. 2017, as in Detectron and tensorpack, that the paper (4.2) trains. Proposals, RoIAlign,
the matching of boxes, losses and post-processing are torchvision's. The assembly and two rules for runs on several
devices (parts.py) are ours.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import roi_align

from kalmannorm.models.detection.parts import (
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

STRIDE = 16  # of the conv4 features


class MaskRCNNC4(nn.Module):
    """(images, targets) -> losses in training, (images) -> detections in evaluation, in torchvision's formats.

    Args:
        classes: number of kinds of objects; the background is label 0 in addition.
        layers, width: blocks per stage, and a factor on the channels of ResNet-50 (narrow ones are for tests).
        size, max_size: images are resized to the short side `size`, or less if the long side would exceed `max_size`.
        boxes: regions per image in the box and mask losses (paper: 256).
        proposals: regions per image that the proposal network returns, in training and in evaluation.
        candidates: numbers of best anchors, likewise, from which non-maximum suppression selects the proposals.
        roi_size: side of RoIAlign's output; conv5 halves it, and the mask has roi_size pixels a side again.

    images: float [3, H, W] each, in [0, 1]. targets: torchvision's (boxes, labels, masks), with at least one object
    each, and `key`, a number from which an image's random samples are drawn. canvas: least (height, width) after
    padding; processes that share a batch must use the same, since padding takes part in statistics.
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
        candidates: Sequence[int] = (12000, 6000),
        roi_size: int = 14,
    ) -> None:
        super().__init__()
        resnet = Resnet(layers, width)
        stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.body = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in stages))
        conv4, conv5 = resnet.layer4[0].conv1.in_channels, resnet.fc.in_features
        anchors = AnchorGenerator((tuple(anchor_sides(size)),), (RATIOS,))
        self.transform = Transform(size, max_size)
        self.rpn = proposal_network(conv4, anchors, proposals, candidates)
        self.roi_heads = RegionHeads(
            None,
            nn.Sequential(OrderedDict(layer4=resnet.layer4)),
            in_float32(FastRCNNPredictor(conv5, classes + 1)),
            **HEADS,
            batch_size_per_image=boxes,
            mask_predictor=in_float32(MaskRCNNPredictor(conv5, max(8, round(256 * width)), classes + 1)),
        )
        self.roi_heads.fg_bg_sampler = KeyedSampler(boxes, 0.25, salt=1)
        self.roi_heads.boxes, self.roi_heads.roi_size = boxes, roi_size

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None, canvas: tuple[int, int] | None = None
    ) -> Any:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        self.transform.canvas = canvas or (0, 0)
        batch, targets = self.transform(images, targets)
        if targets is not None:
            give_keys(self, targets)
        features, belief = self.body(batch.tensors), None
        if isinstance(features, tuple):  # a converted body that returns its belief too
            features, belief = features
        maps = OrderedDict([("0", features)])
        proposals, rpn_losses = self.rpn(batch, maps, targets)
        detections, losses = self.roi_heads(maps, proposals, batch.image_sizes, targets, belief)
        if self.training:
            return rpn_losses | losses
        return self.transform.postprocess(detections, batch.image_sizes, sizes)


class RegionHeads(RoIHeads):
    """torchvision's RoIHeads with one pass through conv5, whose features boxes and masks share in training.

    Each image gives exactly `boxes` rows to conv5, so that all images have equal weight in the statistics: if fewer
    regions are sampled, they are repeated in turn, and repeats count in no loss. Region j of image n of N is row
    j N + n. So the images of an interleaved statistics group (image n in group n mod G) and their regions (row i in
    group i mod G) are in the same group, for every statistics batch.
    """

    boxes: int
    roi_size: int
    carries = False  # whether box_head is called with the features' belief, (x, belief)
    rows_are_images = False  # whether that belief has a row per image, not per group of images

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
        belief: Any = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        (image_map,) = features.values()
        if self.training:
            return [], self._losses(image_map, proposals, targets, belief)
        return self._detect(image_map, proposals, image_shapes, belief), {}

    def _losses(
        self, image_map: Tensor, proposals: list[Tensor], targets: list[dict[str, Any]] | None, belief: Any
    ) -> dict[str, Tensor]:
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        assert targets is not None
        number, counts = len(proposals), [len(own) for own in labels]
        turns = torch.arange(self.boxes, device=image_map.device)
        regions = torch.stack([own[turns % len(own)] for own in proposals], 1)  # [boxes, N, 4]
        image = torch.arange(number, device=image_map.device).repeat(self.boxes)
        conv5 = self._conv5(image_map, regions.flatten(0, 1), image, belief).unflatten(0, (self.boxes, number))
        own_features = [conv5[:count, n] for n, count in enumerate(counts)]

        logits, deltas = self.box_predictor(torch.cat(own_features).mean((2, 3)))
        of_images = zip(logits.split(counts), deltas.split(counts), labels, box_targets, strict=True)
        box_losses = [fastrcnn_loss(ls, ds, [own], [wanted]) for ls, ds, own, wanted in of_images]

        positive = [own > 0 for own in labels]
        masks = self.mask_predictor(torch.cat([f[chosen] for f, chosen in zip(own_features, positive, strict=True)]))
        mask_losses = [
            maskrcnn_loss(own, [boxes[chosen]], [target["masks"]], [target["labels"]], [matches[chosen]])
            for own, boxes, chosen, target, matches in zip(
                masks.split([int(chosen.sum()) for chosen in positive]),
                proposals,
                positive,
                targets,
                matched,
                strict=True,
            )
        ]
        classifier, box_reg = (torch.stack(losses).mean() for losses in zip(*box_losses, strict=True))
        return {"loss_classifier": classifier, "loss_box_reg": box_reg, "loss_mask": torch.stack(mask_losses).mean()}

    def _detect(
        self, image_map: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]], belief: Any
    ) -> list[dict[str, Tensor]]:
        conv5 = self._conv5(image_map, torch.cat(proposals), _image_of(proposals), belief)
        logits, deltas = self.box_predictor(conv5.mean((2, 3)))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        if sum(map(len, boxes)):
            conv5 = self._conv5(image_map, torch.cat(boxes), _image_of(boxes), belief)
            masks = maskrcnn_inference(self.mask_predictor(conv5), labels)
        else:
            masks = [image_map.new_zeros(0, 1, self.roi_size, self.roi_size) for _ in boxes]
        together = zip(boxes, scores, labels, masks, strict=True)
        return [dict(zip(("boxes", "scores", "labels", "masks"), own, strict=True)) for own in together]

    def _conv5(self, image_map: Tensor, boxes: Tensor, image: Tensor, belief: Any) -> Tensor:
        """Return features [R, C, roi_size / 2, roi_size / 2] of boxes [R, 4]. image: each box's image, [R]."""
        rows = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        # As many samples per bin as it has cells, and no half-pixel shift, as in Detectron's C4 models.
        regions = roi_align(image_map, rows, self.roi_size, 1 / STRIDE, sampling_ratio=0, aligned=False)
        if not self.carries:
            return self.box_head(regions)
        if belief is not None and self.rows_are_images:
            belief = type(belief)(*(rows[image] for rows in belief))
        return self.box_head(regions, belief)


def _image_of(boxes: list[Tensor]) -> Tensor:
    counts = torch.tensor([len(own) for own in boxes], device=boxes[0].device)
    return torch.arange(len(boxes), device=boxes[0].device).repeat_interleave(counts)
