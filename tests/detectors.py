"""Small detectors and images for them."""

import torch

SMALL = {
    "layers": (1, 1, 1, 1),
    "width": 0.0625,
    "size": 64,
    "max_size": 96,
    "boxes": 8,
    "proposals": (20, 10),
    "candidates": (100, 50),
    "roi_size": 8,
}


def scene(count, seed=0):
    """Images of one size, two objects each."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 80.0, 55.0]])
    images, targets = [], []
    for key in range(count):
        image, masks = torch.rand(3, 64, 96, generator=generator), torch.zeros(2, 64, 96, dtype=torch.uint8)
        masks[0, 5:40, 5:40], masks[1, 10:55, 20:80] = 1, 1
        images.append(image)
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks, "key": 10 + key})
    return images, targets
