"""Draw what a detector finds on a few images. The picture contains their pixels, so it stays in runs/<id>/."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from kalmannorm.data.annotations import Split
from kalmannorm.data.coco import Images
from kalmannorm.files import write_atomically

SURE = 0.5  # score from which a detection is drawn
SIDE = 400  # pixels of an image's side in the picture
COLOURS = ["#D55E00", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#CC79A7"]  # of Okabe and Ito


@torch.no_grad()
def draw_detections(
    model: nn.Module, split: Split, labels: dict[int, int], positions: Sequence[int], device: torch.device, file: Path
) -> None:
    """Draw boxes, names and masks of detections with a score of at least SURE on the images at these positions, and
    write a PNG file."""
    model.eval()
    images, shown = Images(split, labels), []
    names = {label: split.coco.cats[category]["name"] for category, label in labels.items()}
    for position in positions:
        image, _ = images[position, False, 0]
        (found,) = model([image.to(device).float() / 255])
        picture = resize(image, [SIDE, SIDE])  # resized before drawing, so that names stay readable
        sure = found["scores"] >= SURE
        if sure.any():
            height, width = image.shape[-2:]
            boxes = found["boxes"][sure].cpu() * torch.tensor([SIDE / width, SIDE / height] * 2)
            words = [names[int(label)] for label in found["labels"][sure]]
            colours = [COLOURS[i % len(COLOURS)] for i in range(len(boxes))]
            if "masks" in found:
                masks = resize(found["masks"][sure, 0].cpu(), [SIDE, SIDE]) > 0.5
                picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colours)
            picture = draw_bounding_boxes(
                picture, boxes, words, colors=colours, width=2, label_colors="black", fill_labels=True
            )
        shown.append(picture)
    encoded = io.BytesIO()
    to_pil_image(make_grid(shown, nrow=2)).save(encoded, "PNG")
    write_atomically(file, encoded.getvalue())
