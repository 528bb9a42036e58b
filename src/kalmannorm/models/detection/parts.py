"""Build the parts of both Mask R-CNNs from torchvision's, with two rules by which k devices compute what one does.

Every loss is the mean of torchvision's losses of the single images (as on devices with one image each); and the random
choice of anchors and regions for the losses is keyed by the image.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

CANVAS = 32  # the sides of padded images are multiples of it, as in torchvision
# Anchors of Detectron's C4 models, in pixels of an image with short side 800: 5 x 3 per location. They shrink with the
# budget's resolution, as objects do.
ANCHORS, RATIOS, ANCHORS_AT = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0), 800
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what torchvision's weights expect
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")

Head = TypeVar("Head", bound=nn.Module)

# Options of torchvision's RoIHeads, which has no defaults; the values are those of its MaskRCNN.
HEADS: Mapping[str, Any] = {
    "fg_iou_thresh": 0.5,
    "bg_iou_thresh": 0.5,
    "positive_fraction": 0.25,
    "bbox_reg_weights": None,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 100,
}


def anchor_sides(size: int) -> list[int]:
    """Return the sides of the anchors, in pixels, for images with short side `size`."""
    return [max(1, round(side * size / ANCHORS_AT)) for side in ANCHORS]


def proposal_network(
    channels: int, anchors: AnchorGenerator, proposals: Sequence[int], candidates: Sequence[int]
) -> "ProposalNetwork":
    """Build the proposal network for features with `channels` channels. proposals, candidates: numbers of regions that
    it returns, and from which it selects them, each in training and in evaluation."""
    network = ProposalNetwork(
        anchors,
        in_float32(RPNHead(channels, anchors.num_anchors_per_location()[0])),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), candidates, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), proposals, strict=True)),
        nms_thresh=0.7,
    )
    network.fg_bg_sampler = KeyedSampler(256, 0.5, salt=0)
    return network


def give_keys(model: Any, targets: Sequence[Mapping[str, Any]]) -> None:
    """Hand the images' keys to the samplers, which draw the samples for the next batch's losses from them."""
    for sampler in (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler):
        sampler.keys = [target["key"] for target in targets]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's proposal network, with losses averaged over images instead of over all their anchors."""

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


def in_float32(head: Head) -> Head:
    """Make a head return float32 under autocast too, and return it: boxes decoded from bfloat16 are off by pixels."""
    head.register_forward_hook(_to_float32)
    return head


def _to_float32(head: nn.Module, args: Any, out: Any) -> Any:
    return tree_map(Tensor.float, out)


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of positives and negatives, with a random generator for each image.

    `keys`: one number per image; an image with the same key gets the same samples on every device, in any batch.
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
    """torchvision's transform, which pads to at least `canvas` (height, width)."""

    canvas = (0, 0)

    def __init__(self, size: int, max_size: int) -> None:
        super().__init__(size, max_size, IMAGENET_MEAN, IMAGENET_STD, size_divisible=CANVAS)

    def batch_images(self, images: list[Tensor], size_divisible: int = CANVAS) -> Tensor:
        largest = [math.ceil(max(image.shape[side] for image in images) / CANVAS) * CANVAS for side in (1, 2)]
        height, width = map(max, largest, self.canvas)
        batch = images[0].new_zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch
