"""Evaluation of a detector by pycocotools: average precision of boxes and masks, every image counted once."""

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

# pycocotools' first six numbers, in its order: over IoU 0.5 to 0.95, at 0.5, at 0.75; of small, medium, large objects.
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
    """Return AP in percent (box_ap, mask_ap50, ...; None where no object is of that size) over the images at
    `positions`.

    Of boxes alone where the model finds no masks. `moving`: images one by one. `online`: the backbone, with a pyramid,
    measures the images of each group of `stat_batch`; heads keep to their moving averages, since they see other regions
    than in training: all proposed ones, then detections.
    The images are dealt out to the ranks, all of which return the same.
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
    """Deal out this rank's groups of `size` images, in the fixed order, as (number, False where it only fills one)."""
    order = fixed_order(count).tolist()
    for start in range(ranks.rank * size, count, ranks.world * size):
        real = order[start : start + size]
        filling = [order[i % count] for i in range(size - len(real))]
        yield [(i, True) for i in real] + [(i, False) for i in filling]


def as_results(output: dict[str, Tensor], image_id: int, categories: dict[int, int]) -> Detections:
    """Return one image's detections in COCO's result format, masks, if any, cut at 1/2 as run-length codes."""
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
    """Compute pycocotools' box and mask AP of `detections` on the images `ids`, in percent, and count both."""
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
        # Without a single detection all is 0; -1 is pycocotools' word for "no such object".
        numbers = [0.0] * len(NAMES) if evaluation is None else evaluation.stats[: len(NAMES)]
        for key, number in zip(NAMES, numbers, strict=True):
            values[f"{name}_{key}"] = None if number < 0 else 100 * float(number)
    return values


def _of_kind(detections: Detections, kind: str) -> Detections:
    """Leave out the other kind's field: pycocotools tells the kind of a result by the fields it has."""
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in detection.items() if key != other} for detection in detections]


def finds_masks(model: nn.Module) -> bool:
    """Say whether a detector finds masks beside boxes."""
    return model.roi_heads.mask_predictor is not None  # type: ignore[union-attr]
