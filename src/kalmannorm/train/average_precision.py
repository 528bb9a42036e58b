"""Evaluate a detector by pycocotools: average precision of boxes and masks, every image counted once."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_length
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from kalmannorm.data.annotations import Split
from kalmannorm.data.batches import fixed_order
from kalmannorm.data.coco import Images
from kalmannorm.experiments.record import Evaluation
from kalmannorm.norm.modes import set_statistics, shard_noise
from kalmannorm.train.detector import of_images
from kalmannorm.train.ranks import Ranks

# pycocotools' first six numbers, in its order: AP averaged over IoU 0.5 to 0.95; at IoU 0.5; at 0.75; averaged over
# IoU for small, medium and large objects.
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}

Detections = list[dict[str, Any]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    labels: dict[int, int],
    positions: list[int],
    statistics: str,
    stat_batch: int | None,
    ranks: Ranks,
) -> Evaluation:
    """Return AP in percent over the images at `positions`: box_ap, mask_ap50, ...; None if no object has that size.

    A model that finds no masks is evaluated on boxes only. Under "moving" statistics images go through one by one.
    Under "online" statistics the backbone, with its pyramid if any, measures each group of `stat_batch` images; heads
    keep their moving averages, since they see other regions than in training: all proposals, then the detections.
    `labels`: category id -> label. Images are dealt out to the ranks, all of which return the same result.
    """
    shard_noise(model, (0, 1))
    set_statistics(model, "moving")
    if statistics == "online":
        set_statistics(of_images(model), "online")
    model.eval()
    categories = {label: category for category, label in labels.items()}
    images = Images(split, labels)
    found: Detections = []
    for group in _groups(len(positions), (stat_batch or 1) if statistics == "online" else 1, ranks):
        pictures = [images[positions[i], False, 0] for i, _ in group]
        outputs = model([image.to(ranks.device).float() / 255 for image, _ in pictures])
        for (_, counted), (_, target), output in zip(group, pictures, outputs, strict=True):
            if counted:
                found += as_results(output, target["image_id"], categories)
    set_statistics(model, "moving")
    gathered = ranks.gather(found)
    together = [detection for part in gathered for detection in part]
    ids = [split.ids[position] for position in positions]
    kinds = KINDS if finds_masks(model) else {"box": KINDS["box"]}
    return ranks.from_main(average_precision(split, ids, together, kinds) if ranks.main else None)


def _groups(count: int, size: int, ranks: Ranks) -> Iterator[list[tuple[int, bool]]]:
    """Yield this rank's groups of `size` images, in the fixed order, as pairs: the image's number, and whether it
    counts or only fills up the last group."""
    order = fixed_order(count).tolist()
    for start in range(ranks.rank * size, count, ranks.world * size):
        real = order[start : start + size]
        filling = [order[i % count] for i in range(size - len(real))]
        yield [(i, True) for i in real] + [(i, False) for i in filling]


def as_results(output: dict[str, Tensor], image_id: int, categories: dict[int, int]) -> Detections:
    """Return one image's detections in COCO's result format; masks, if any, thresholded at 1/2 and run-length coded."""
    boxes, scores, labels = (output[key].double().cpu().numpy() for key in ("boxes", "scores", "labels"))
    results: Detections = [
        {
            "image_id": image_id,
            "category_id": categories[int(label)],
            "bbox": [float(v) for v in (left, top, right - left, bottom - top)],
            "score": float(score),
        }
        for (left, top, right, bottom), score, label in zip(boxes, scores, labels, strict=True)
    ]
    if "masks" in output:
        masks = (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            result["segmentation"] = run_length.encode(np.asfortranarray(mask))
    return results


def average_precision(
    split: Split, ids: list[int], detections: Detections, kinds: Mapping[str, str] = KINDS
) -> Evaluation:
    """Return pycocotools' box and mask AP of `detections` on the images `ids`, in percent, and both their numbers."""
    values: Evaluation = {"images": len(ids), "detections": len(detections)}
    for name, kind in kinds.items():
        with contextlib.redirect_stdout(io.StringIO()):
            results = split.coco.loadRes(_of_kind(detections, kind)) if detections else None
            evaluation = COCOeval(split.coco, results, kind) if results else None
            if evaluation is not None:
                evaluation.params.imgIds = sorted(ids)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
        # pycocotools cannot load an empty list: without detections every AP is 0. Its -1 means "no such object".
        numbers = [0.0] * len(NAMES) if evaluation is None else evaluation.stats[: len(NAMES)]
        for key, number in zip(NAMES, numbers, strict=True):
            values[f"{name}_{key}"] = None if number < 0 else 100 * float(number)
    return values


def _of_kind(detections: Detections, kind: str) -> Detections:
    """Drop the other kind's field: pycocotools tells boxes from masks by the fields of a result."""
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in detection.items() if key != other} for detection in detections]


def finds_masks(model: nn.Module) -> bool:
    """Say whether a detector finds masks beside boxes."""
    return model.roi_heads.mask_predictor is not None  # type: ignore[union-attr]
