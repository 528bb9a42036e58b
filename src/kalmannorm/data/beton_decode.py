"""Define FFCV operations, compiled by numba, that draw an image's crop and flip from its key. Imports ffcv.

An index has 64 bits: the image's number in the lower half, its key in the upper one (data/beton_loader.py).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler

from kalmannorm.data.stream import RATIO, RESIZE, SCALE

NUMBER, KEY = np.uint64(0xFFFFFFFF), np.uint64(32)  # mask of the image's number, shift of its key
TRIES = 10  # attempts at a crop before the centre is taken, as in torchvision

Box = tuple[int, int, int, int]  # row, column, height, width


def set_threads(count: int) -> None:
    """Set FFCV's number of threads only. FFCV's own function also sets torch's, which changes the results of a training
    on the CPU."""

    def threads(n: int) -> None:
        Compiler.num_threads = min(n, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(Compiler.num_threads)

    Compiler.set_num_threads = staticmethod(threads)
    threads(count)


@numba.njit
def uniform(key: int, number: int) -> float:
    """Return the random number with index `number` of a key, in [0, 1): splitmix64's finalizer (Steele et al. 2014)."""
    z = (np.uint64(key) << np.uint64(32)) + np.uint64(number + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / 9007199254740992.0


@numba.njit
def random_box(height: int, width: int, key: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Return a random-resized crop as torchvision draws it: area uniform, aspect ratio log-uniform in their ranges."""
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for n in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform(key, 4 * n))
        aspect = np.exp(low + (high - low) * uniform(key, 4 * n + 1))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            row = int(uniform(key, 4 * n + 2) * (height - h + 1))
            return row, int(uniform(key, 4 * n + 3) * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


class Crop(SimpleRGBImageDecoder):
    """Decodes an image to uint8 [size, size, 3]: a random crop, mirrored if `flip`; without `augment` the centre."""

    def __init__(self, size: int, augment: bool, flip: bool) -> None:
        super().__init__()
        self.size, self.augment, self.flip = size, augment, flip

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        image, bytes_ = (self.size, self.size, 3), np.dtype("u1")
        largest = (self.metadata["height"].astype(np.int64) * self.metadata["width"]).max() * 3
        state = replace(previous_state, jit_mode=True, shape=image, dtype=bytes_)
        return state, (AllocationQuery(image, bytes_), AllocationQuery((int(largest),), bytes_))

    def generate_code(self) -> Callable[..., Any]:
        read, every = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        augment, flip, scale, ratio, centre = self.augment, self.flip, SCALE, RATIO, 1 / RESIZE
        jpeg = IMAGE_MODES["jpg"]

        def decode(batch: Any, memory: Any, metadata: Any, storage: Any) -> Any:
            out, raw = memory
            for i in every(len(batch)):
                field, key = metadata[batch[i] & NUMBER], batch[i] >> KEY
                height, width = np.int64(field["height"]), np.int64(field["width"])
                stored = read(field["data_ptr"], storage)
                if field["mode"] == jpeg:
                    pixels = raw[i][: 3 * height * width]
                    decode_jpeg(stored, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    image = pixels.reshape(height, width, 3)
                else:
                    image = stored.reshape(height, width, 3)
                if augment:
                    row, column, h, w = random_box(height, width, key, scale, ratio)
                else:
                    h = w = round(min(height, width) * centre)
                    row, column = (height - h) // 2, (width - w) // 2
                resize(image, row, row + h, column, column + w, out[i])
                if flip and uniform(key, 4 * TRIES) < 0.5:
                    out[i] = out[i][:, ::-1].copy()
            return out[: len(batch)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class Label(IntDecoder):
    """Decodes an image's label, int64 [1]."""

    def generate_code(self) -> Callable[..., Any]:
        def decode(batch: Any, out: Any, metadata: Any, storage: Any) -> Any:
            for i in range(len(batch)):
                out[i] = metadata[batch[i] & NUMBER]
            return out[: len(batch)]

        return decode
