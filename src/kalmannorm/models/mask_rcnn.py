"""Mask R-CNN with a ResNet-50 conv4 backbone (C4): RoI features go through conv5, which boxes and masks share.

He et al. 2017, as Detectron and tensorpack have it; what the paper (4.2) trains. Proposals, RoIAlign, the matching of
boxes, losses and post-processing are torchvision's. Ours are the assembly and two rules without which a run on k
devices would not be the run on one: every loss is the mean over the images of torchvision's loss of that image (as on
devices with one image each), and what is drawn (anchors and regions for the losses) is keyed by the image.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import roi_align

STRIDE = 16  # of the conv4 features
CANVAS = 32  # padded images are a multiple of it, as torchvision's are
# Anchors of Detectron's C4 models, in pixels of an image whose short side is 800: 5 x 3 a location. They shrink with
# the budget's resolution, as objects do.
ANCHORS, RATIOS, ANCHORS_AT = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0), 800
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what torchvision's weights expect
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


class MaskRCNNC4(nn.Module):
    """(images, targets) -> losses in training, (images) -> detections in evaluation, in torchvision's formats.

    Args:
        classes: of objects; the background comes on top, as label 0.
        layers, width: blocks per stage and a factor on the channels of ResNet-50 (narrow ones are for tests).
        size, max_size: images are resized to this short side, but to no longer side than that.
        boxes: regions an image that the box and mask losses see (paper: 256).
        proposals: regions an image that the proposal network hands on in training and in evaluation.
        candidates: how many of the best anchors, ahead of the non-maximum suppression, those are taken from.
        roi_size: side of RoIAlign's output; conv5 halves it, the mask has roi_size pixels a side again.

    images: float [3, H, W] each, in [0, 1]; targets: torchvision's (boxes, labels, masks), at least one object each,
    and `key`, a number that determines what is drawn for this image. `canvas` (height, width): pad to that at least;
    processes that share a batch must agree on it, since what is padded takes part in statistics.
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
        anchors = AnchorGenerator((tuple(max(1, round(a * size / ANCHORS_AT)) for a in ANCHORS),), (RATIOS,))
        self.transform = Transform(size, max_size, IMAGENET_MEAN, IMAGENET_STD, size_divisible=CANVAS)
        self.rpn = ProposalNetwork(
            anchors,
            FullPrecisionHead(conv4, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), candidates, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), proposals, strict=True)),
            nms_thresh=0.7,
        )
        self.rpn.fg_bg_sampler = KeyedSampler(256, 0.5, salt=0)
        self.roi_heads = RegionHeads(
            None,
            nn.Sequential(OrderedDict(layer4=resnet.layer4)),
            FastRCNNPredictor(conv5, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=boxes,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_predictor=MaskRCNNPredictor(conv5, max(8, round(256 * width)), classes + 1),
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
            for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
                sampler.keys = [target["key"] for target in targets]
        features, belief = self.body(batch.tensors), None
        if isinstance(features, tuple):  # a converted body that hands its belief on
            features, belief = features
        maps = OrderedDict([("0", features)])
        proposals, rpn_losses = self.rpn(batch, maps, targets)
        detections, losses = self.roi_heads(maps, proposals, batch.image_sizes, targets, belief)
        if self.training:
            return rpn_losses | losses
        return self.transform.postprocess(detections, batch.image_sizes, sizes)


class RegionHeads(RoIHeads):
    """torchvision's RoIHeads on one pass through conv5, whose features boxes and masks share in training.

    Each image gives exactly `boxes` rows to conv5, so that statistics are of equally many regions of each image: where
    fewer are sampled they are repeated in turn, and repeats count in no loss. Region j of image n of N is row j N + n;
    so the images of an interleaved statistics group (image n of G groups in group n mod G) and their regions (row i in
    group i mod G) are in the same group, whatever the statistics batch.
    """

    boxes: int
    roi_size: int
    carries = False  # whether box_head takes the belief of the features, as (x, belief)
    rows_are_images = False  # whether that belief has a row an image, and not a row a group of images

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

        logits, deltas = self._predict_boxes(torch.cat(own_features))
        of_images = zip(logits.split(counts), deltas.split(counts), labels, box_targets, strict=True)
        box_losses = [fastrcnn_loss(ls, ds, [own], [wanted]) for ls, ds, own, wanted in of_images]

        positive = [own > 0 for own in labels]
        masks = self.mask_predictor(torch.cat([f[chosen] for f, chosen in zip(own_features, positive, strict=True)]))
        mask_losses = [
            maskrcnn_loss(own, [boxes[chosen]], [target["masks"]], [target["labels"]], [matches[chosen]])
            for own, boxes, chosen, target, matches in zip(
                masks.float().split([int(chosen.sum()) for chosen in positive]),
                proposals,
                positive,
                targets,
                matched,
                strict=True,
            )
        ]
        classifier, box_reg = (torch.stack(losses).mean() for losses in zip(*box_losses, strict=True))
        return {
            "loss_classifier": classifier,
            "loss_box_reg": box_reg,
            "loss_mask": torch.stack(mask_losses).mean(),
        }

    def _detect(
        self, image_map: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]], belief: Any
    ) -> list[dict[str, Tensor]]:
        conv5 = self._conv5(image_map, torch.cat(proposals), _image_of(proposals), belief)
        logits, deltas = self._predict_boxes(conv5)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        if sum(map(len, boxes)):
            conv5 = self._conv5(image_map, torch.cat(boxes), _image_of(boxes), belief)
            masks = maskrcnn_inference(self.mask_predictor(conv5).float(), labels)
        else:
            masks = [image_map.new_zeros(0, 1, self.roi_size, self.roi_size) for _ in boxes]
        together = zip(boxes, scores, labels, masks, strict=True)
        return [dict(zip(("boxes", "scores", "labels", "masks"), own, strict=True)) for own in together]

    def _conv5(self, image_map: Tensor, boxes: Tensor, image: Tensor, belief: Any) -> Tensor:
        """boxes [R, 4] on the images with the numbers `image` [R] -> features [R, C, roi_size / 2, roi_size / 2]."""
        rows = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        # As many samples a bin as it has cells, and no half-pixel shift: as Detectron's C4 models.
        regions = roi_align(image_map, rows, self.roi_size, 1 / STRIDE, sampling_ratio=0, aligned=False)
        if not self.carries:
            return self.box_head(regions)
        if belief is not None and self.rows_are_images:
            belief = type(belief)(*(rows[image] for rows in belief))
        return self.box_head(regions, belief)

    def _predict_boxes(self, conv5: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(conv5.mean((2, 3)))
        return logits.float(), deltas.float()


def _image_of(boxes: list[Tensor]) -> Tensor:
    counts = torch.tensor([len(own) for own in boxes], device=boxes[0].device)
    return torch.arange(len(boxes), device=boxes[0].device).repeat_interleave(counts)


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, its losses averaged over images instead of over all their anchors."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        number, keys = len(labels), self.fg_bg_sampler.keys
        scores, deltas = objectness.chunk(number), pred_bbox_deltas.chunk(number)
        losses = []
        for n in range(number):
            self.fg_bg_sampler.keys = keys[n : n + 1]
            losses.append(super().compute_loss(scores[n], deltas[n], labels[n : n + 1], regression_targets[n : n + 1]))
        first, second = (torch.stack(values).mean() for values in zip(*losses, strict=True))
        return first, second


class FullPrecisionHead(RPNHead):
    """Boxes decoded from bfloat16 would be off by pixels: what leaves the head is float32 under autocast too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of positives and negatives, which draws for each image from a generator of its own.

    `keys`: a number an image; the same image with the same key draws the same on every device, in any batch.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self.salt = salt
        self.keys: list[int] = []

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = [self._one(matched, key) for matched, key in zip(matched_idxs, self.keys, strict=True)]
        return [positive for positive, _ in chosen], [negative for _, negative in chosen]

    def _one(self, matched: Tensor, key: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((key + self.salt) % 2**63)
        masks, room = [], int(self.batch_size_per_image * self.positive_fraction)
        for candidates in (torch.where(matched >= 1)[0], torch.where(matched == 0)[0]):
            order = torch.randperm(len(candidates), generator=generator)[:room].to(matched.device)
            mask = torch.zeros_like(matched, dtype=torch.uint8)
            mask[candidates[order]] = 1
            masks.append(mask)
            room = self.batch_size_per_image - len(order)
        return masks[0], masks[1]


class Transform(GeneralizedRCNNTransform):
    """torchvision's, which pads to `canvas` (height, width) at least."""

    canvas = (0, 0)

    def batch_images(self, images: list[Tensor], size_divisible: int = CANVAS) -> Tensor:
        largest = [max(image.shape[side] for image in images) for side in (1, 2)]
        height, width = (max(own, asked) for own, asked in zip(padded_to(*largest), self.canvas, strict=True))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch


def padded_to(height: int, width: int) -> tuple[int, int]:
    """The next multiples of CANVAS."""
    return math.ceil(height / CANVAS) * CANVAS, math.ceil(width / CANVAS) * CANVAS


class Resnet(ResNet):
    """torchvision's ResNet with all channels but the stem's times `width`."""

    def __init__(self, layers: Sequence[int], width: float) -> None:
        self.factor = width
        super().__init__(Bottleneck, list(layers))
        self.fc = nn.Linear(round(512 * width) * Bottleneck.expansion, 1)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, max(1, round(planes * self.factor)), *args, **kwargs)
