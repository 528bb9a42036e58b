"""Load scenes and their label maps: crops of one size in training, whole scenes in evaluation.

In training the short side is resized to `size` times a random one of `scales`, and a crop of [height, width] is taken
at a random place. Where the scene is smaller than the crop, the rest is filled with the mean colour and ignored pixels.
Half of the crops are mirrored. All random numbers come from the image's key (stream.py).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize

from kalmannorm.data.batches import Counted
from kalmannorm.data.scenes import IGNORED, REMEDY, Scenes
from kalmannorm.data.stream import UNAUGMENTED, Decoding, Sample

Wholes = tuple[list[Tensor], list[Tensor], int]  # images, classes of their pixels, and how many images count


class SceneLoader(Decoding):
    """Batches of one split: `epoch` yields images float32 [n, 3, *crop] and classes uint8 [n, *crop].

    `wholes` yields whole scenes, normalized.

    size, scales, flip: of the crops, see above. options: those of Decoding.
    """

    remedy = REMEDY

    def __init__(
        self, scenes: Scenes, *, size: int, crop: Sequence[int], scales: Sequence[float], flip: bool, **options: Any
    ) -> None:
        self.scenes = scenes
        fill = [round(255 * value) for value in options["mean"]]
        super().__init__(_Decode(scenes, size, crop, scales, flip, fill), len(scenes), **options)

    def wholes(self, batch: int, order: Tensor | None = None, fill: int = 1) -> Iterator[Wholes]:
        """Yield batches as `unaugmented` does, as lists: images [3, H, W], classes [H, W] at the files' resolution."""
        return cast(Iterator[Wholes], self.unaugmented(batch, order, fill))

    def _unaugmented(self, parts: Iterator[tuple[Tensor, int]]) -> Iterator[Counted]:
        listed = list(parts)
        keyed = ((indices, torch.zeros_like(indices)) for indices, _ in listed)
        for (images, labels), (_, counted) in zip(self.decoded(keyed, False, 0), listed, strict=True):
            x = [self._normalized(image[None].to(self.device))[0] for image in images]
            yield x, [label.to(self.device) for label in labels], counted  # type: ignore[misc]


class _Decode(Dataset[Sample]):
    """Map (index, key) to an image and the classes of its pixels."""

    def __init__(
        self, scenes: Scenes, size: int, crop: Sequence[int], scales: Sequence[float], flip: bool, fill: list[int]
    ) -> None:
        self.scenes, self.size, self.crop, self.scales, self.flip = scenes, size, crop, scales, flip
        self.fill = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)

    def __getitem__(self, drawn: tuple[int, int]) -> Sample:
        index, key = drawn
        picture, numbers = self.scenes.read(index)
        image, classes = pil_to_tensor(picture), torch.from_numpy(np.ascontiguousarray(numbers))
        return (image, classes) if key == UNAUGMENTED else self._crop(image, classes, key)

    def _crop(self, image: Tensor, classes: Tensor, key: int) -> tuple[Tensor, Tensor]:
        draw = functools.partial(torch.rand, generator=torch.Generator().manual_seed(key))
        factor, down, right, mirrored = draw(4).tolist()
        height, width = scaled(image.shape[-2:], self.size * self.scales[int(factor * len(self.scales))])
        image = resize(image, [height, width], InterpolationMode.BILINEAR, antialias=True)
        classes = resize(classes[None], [height, width], InterpolationMode.NEAREST_EXACT)[0]
        top, left = (int(part * (max(0, side - of) + 1)) for part, side, of in
                     zip((down, right), (height, width), self.crop, strict=True))  # fmt: skip
        image, classes = (each[..., top : top + self.crop[0], left : left + self.crop[1]] for each in (image, classes))
        whole = self.fill.expand(3, *self.crop).clone()
        whole[:, : image.shape[1], : image.shape[2]] = image
        lacking = (0, self.crop[1] - classes.shape[1], 0, self.crop[0] - classes.shape[0])
        classes = F.pad(classes, lacking, value=IGNORED)
        return (whole.flip(-1), classes.flip(-1)) if self.flip and mirrored < 0.5 else (whole, classes)


def scaled(sides: Sequence[int], short: float) -> tuple[int, int]:
    """Return (height, width) of a scene after its short side is resized to `short`."""
    height, width = (max(1, round(side * short / min(sides))) for side in sides)
    return height, width
