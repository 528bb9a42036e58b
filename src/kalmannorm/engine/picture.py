"""A picture of what a detector finds on a few validation images. It holds their pixels: it stays in runs/<id>/."""

import io
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from kalmannorm.data.coco import Coco, Images, evaluation_order
from kalmannorm.runs.record import write_atomically

SURE = 0.5  # score from which a detection is drawn
SIDE = 400  # pixels of an image's side in the picture
COLOURS = ["#D55E00", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#CC79A7"]  # of Okabe and Ito


@torch.no_grad()
def draw_detections(model: nn.Module, images: Coco, count: int, device: torch.device, file: Path) -> None:
    """Writes boxes, names and masks of the sure detections on `count` validation images as a PNG file."""
    model.eval()
    split, shown = Images(images.test, images.labels), []
    names = {label: images.test.coco.cats[category]["name"] for category, label in images.labels.items()}
    for position in evaluation_order(len(images.test.ids))[:count]:
        picture, _ = split[position, False, 0]
        (found,) = model([picture.to(device).float() / 255])
        sure = found["scores"] >= SURE
        if sure.any():
            masks, boxes = (found[key][sure].cpu() for key in ("masks", "boxes"))
            words = [names[int(label)] for label in found["labels"][sure]]
            colours = [COLOURS[i % len(COLOURS)] for i in range(len(boxes))]
            picture = draw_segmentation_masks(picture, masks[:, 0] > 0.5, alpha=0.5, colors=colours)
            picture = draw_bounding_boxes(picture, boxes, words, colors=colours, width=2)
        shown.append(resize(picture, [SIDE, SIDE]))
    encoded = io.BytesIO()
    to_pil_image(make_grid(shown, nrow=2)).save(encoded, "PNG")
    write_atomically(file, encoded.getvalue())
