"""Image files as people have them -> 8-bit RGB, upright. Every reader of files (folder, COCO, FFCV's writer) goes here.

Formats are named one by one: with all of Pillow's, a file that says it is PostScript would be handed to ghostscript,
which is a programming language. What a file claims to be is looked at before anything is allocated for it.
"""

import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from kalmannorm.errors import UserError, reason

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
PIXELS = 89_478_485  # of an image: where Pillow begins to warn of decompression bombs; 256 MiB as RGB
ORIENTATION = 0x0112  # EXIF's tag

T = TypeVar("T")

# The limit here is PIXELS; of damaged metadata it is only the orientation that is read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")


class Unreadable(UserError):
    """An image file that cannot be decoded, with its path and the reason."""


@dataclass(frozen=True)
class Header:
    """What a file says of its picture: pixels as stored, and EXIF's orientation, 1 (as stored) to 8."""

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture as it is to be seen."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)


def read_rgb(path: Path) -> Image.Image:
    """Read the picture as 8-bit RGB, turned as EXIF says; of several in a file the first.

    Grey, palettes, CMYK and the like are converted, transparency is dropped, of 16 bits the upper eight are taken.
    Unreadable: damaged or no image; another format than FORMATS; 32-bit integers and floats, whose black and white no
    file tells; too many pixels.
    """

    def read(image: Image.Image, header: Header) -> Image.Image:
        upright = image.format == "TIFF"  # Pillow turns these itself while it loads them
        _refuse_misread(image)
        rgb = _wide(image) if image.mode.startswith(("I", "F")) else image.convert("RGB")
        if header.orientation == 1 or upright:
            return rgb
        return Image.fromarray(turn(np.asarray(rgb), header.orientation))

    return _open(path, read)


def read_numbers(path: Path) -> NDArray[np.uint8]:
    """Read a map of numbers, one byte a pixel, grey or of a palette: uint8 [H, W], as stored. Unreadable: damaged, no
    image, or one of another kind; a form in which numbers become others without a word."""

    def read(image: Image.Image, header: Header) -> NDArray[np.uint8]:
        if image.mode not in ("L", "P"):
            raise ValueError(f"its pixels are {image.mode}, expected numbers of one byte, grey or of a palette")
        if image.format == "JPEG":
            raise ValueError("a JPEG, which does not keep numbers: expected PNG")
        if image.mode == "L" and "'L;" in str(getattr(image, "tile", "")):  # Pillow stretches them to 0 to 255
            raise ValueError("its greys have fewer than 8 bits, or white is 0: expected numbers of one byte")
        numbers = np.asarray(image)
        if image.mode == "P":
            _refuse_greys(image, np.unique(numbers))
        return numbers

    return _open(path, read)


def look(path: Path) -> Header:
    """Read size and orientation, without decoding the pixels. Unreadable: as for `read_rgb`, if it shows."""
    return _open(path, lambda _, header: header)


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn [H, W, ...] as stored -> as EXIF's `orientation` says it is to be seen (EXIF 2.32, 4.6.4)."""
    mirrored = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation]  # counterclockwise, after the mirror
    return np.ascontiguousarray(np.rot90(mirrored, quarters))


def turn_box(box: tuple[float, float, float, float], header: Header) -> tuple[float, float, float, float]:
    """Turn (left, top, width, height) in the stored picture -> in the upright one."""
    x, y, w, h = box
    if header.orientation in (2, 4, 5, 7):
        x = header.width - x - w
    if header.orientation in (3, 4):
        x, y = header.width - x - w, header.height - y - h
    elif header.orientation in (5, 8):
        x, y, w, h = y, header.width - x - w, h, w
    elif header.orientation in (6, 7):
        x, y, w, h = header.height - y - h, x, h, w
    return x, y, w, h


def _open(path: Path, use: Callable[[Image.Image, Header], T]) -> T:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for somebody to write to it
            raise ValueError("no plain file")
        with Image.open(path, formats=FORMATS) as image:
            header = _header(image, path)
            if header.width * header.height > PIXELS:
                raise ValueError(f"{header.width} x {header.height} pixels, expected at most {PIXELS:,}")
            return use(image, header)
    except Exception as error:  # Pillow raises many things for a damaged file
        raise Unreadable(f"cannot read {os.fspath(path)}: {_reason(error, path)}") from None


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"no image, or damaged at its beginning, or none of {', '.join(FORMATS)}"
    return reason(error).replace(str(path), "it")


def _header(image: Image.Image, path: Path) -> Header:
    width, height = image.size
    if isinstance(image, TiffImageFile):  # Pillow's size may be the upright one
        width, height = image.tag_v2[256], image.tag_v2[257]
    return Header(width, height, _orientation(image, path))


def _orientation(image: Image.Image, path: Path) -> int:
    """Read the orientation: 1 where EXIF data are missing, damaged or mean nothing: as every viewer has it."""
    try:
        if image.format == "PNG":
            exif = Image.Exif()
            exif.load(_png_exif(path))
        else:
            exif = image.getexif()
        found = exif.get(ORIENTATION)
    except Exception:  # whatever damaged EXIF data make of it
        return 1
    return found if type(found) is int and 1 <= found <= 8 else 1


def _png_exif(path: Path) -> bytes:
    """Find the EXIF chunk, which may stand behind the pixels, where Pillow finds it only after decoding them."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(min(length, 2**20))
            if kind == b"IEND":
                break
            file.seek(length + 4, os.SEEK_CUR)
    return b""


def _refuse_misread(image: Image.Image) -> None:
    """Raise ValueError for what Pillow makes another picture of without a word."""
    if not isinstance(image, TiffImageFile):
        return
    bits, planes, formats = (image.tag_v2.get(tag, default) for tag, default in ((258, (1,)), (284, 1), (339, ())))
    if planes == 2 and max(bits) > 8:
        raise ValueError("its channels of 16 bits stand one behind the other: convert it to 8 bits")
    if image.mode == "L" and 2 in formats:
        raise ValueError("its pixels have signs, and nothing says which is black: convert it to 8 bits without")


def _refuse_greys(image: Image.Image, numbers: NDArray[np.uint8]) -> None:
    """Raise ValueError where the numbers of a palette stand for a map's own, its greys, as programs that make files
    smaller leave it."""
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    greys = palette[numbers, 0] if len(palette) > numbers.max() else numbers
    if (palette == palette[:, :1]).all() and len(set(greys)) == len(greys) and (greys != numbers).any():
        raise ValueError("its palette has other greys than its numbers, and nothing says which count: save it in grey")


def _wide(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits; Pillow's own conversion saturates."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    # Pillow opens 16-bit PNG and PGM files in the mode of 32 bits in some of its versions.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(f"its pixels are 32-bit {kind}, and nothing says which is white: convert it to 8 or 16 bits")
    bits = tags.get(258, (16,))[0]
    grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")
