"""Read image files as people have them to upright 8-bit RGB: for image folders, COCO, scenes and FFCV's writer.

Formats are named one by one: with all of Pillow's, a file that claims to be PostScript would be run by ghostscript.
The size that a file claims is checked before memory is allocated for it.
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
PIXELS = 89_478_485  # most of an image: where Pillow warns of decompression bombs; 256 MiB as RGB
ORIENTATION = 0x0112  # EXIF's tag

T = TypeVar("T")

# Warnings are not needed: PIXELS is the limit here, and only the orientation is read from the metadata.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")


class Unreadable(UserError):
    """An image file that cannot be decoded, with its path and the reason."""


@dataclass(frozen=True)
class Header:
    """Size of a picture as stored, in pixels, and its EXIF orientation, 1 (upright as stored) to 8."""

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the picture turned upright."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)


def read_rgb(path: Path) -> Image.Image:
    """Read the first picture of a file as 8-bit RGB, turned as EXIF says.

    Grey, palettes, CMYK and the like are converted, transparency is dropped, the upper eight of 16 bits are taken.
    Unreadable: the file is damaged, no image, or in another format than FORMATS; it has 32-bit integers or floats, for
    which no file says what is black and white; it has too many pixels.
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
    """Read a map of numbers, one byte per pixel, grey or with a palette: uint8 [H, W], as stored.

    Unreadable: the file is damaged, or is no such map; its form changes numbers silently (JPEG, fewer than 8 bits).
    """

    def read(image: Image.Image, header: Header) -> NDArray[np.uint8]:
        if image.mode not in ("L", "P"):
            raise ValueError(f"its pixels are {image.mode}, expected numbers of one byte, grey or of a palette")
        if image.format == "JPEG":
            raise ValueError("a JPEG, which does not keep numbers: expected PNG")
        if image.mode == "L" and "'L;" in str(getattr(image, "tile", "")):  # Pillow would stretch them to 0..255
            raise ValueError("its greys have fewer than 8 bits, or white is 0: expected numbers of one byte")
        numbers = np.asarray(image)
        if image.mode == "P":
            _refuse_greys(image, np.unique(numbers))
        return numbers

    return _open(path, read)


def read_header(path: Path) -> Header:
    """Read size and orientation without decoding the pixels. Unreadable: as for `read_rgb`, if the header shows it."""
    return _open(path, lambda _, header: header)


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn pixels [H, W, ...] from the stored to the upright picture, by EXIF's `orientation` (EXIF 2.32, 4.6.4)."""
    mirrored = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation]  # counterclockwise, after the mirror
    return np.ascontiguousarray(np.rot90(mirrored, quarters))


def turn_box(box: tuple[float, float, float, float], header: Header) -> tuple[float, float, float, float]:
    """Turn a box (left, top, width, height) from the stored to the upright picture."""
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
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise ValueError("no plain file")
        with Image.open(path, formats=FORMATS) as image:
            header = _header(image, path)
            if header.width * header.height > PIXELS:
                raise ValueError(f"{header.width} x {header.height} pixels, expected at most {PIXELS:,}")
            return use(image, header)
    except Exception as error:  # Pillow raises many kinds for a damaged file
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
    """Read the orientation; 1 if EXIF data are missing, damaged or meaningless, as in every viewer."""
    try:
        if image.format == "PNG":
            exif = Image.Exif()
            exif.load(_png_exif(path))
        else:
            exif = image.getexif()
        found = exif.get(ORIENTATION)
    except Exception:  # damaged EXIF data may raise any kind
        return 1
    return found if type(found) is int and 1 <= found <= 8 else 1


def _png_exif(path: Path) -> bytes:
    """Return the EXIF chunk of a PNG, b"" if it has none. Pillow finds one behind the pixels only by decoding these."""
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
    """Raise ValueError for TIFF files that Pillow silently reads as another picture."""
    if not isinstance(image, TiffImageFile):
        return
    bits, planes, formats = (image.tag_v2.get(tag, default) for tag, default in ((258, (1,)), (284, 1), (339, ())))
    if planes == 2 and max(bits) > 8:
        raise ValueError("its channels of 16 bits stand one behind the other: convert it to 8 bits")
    if image.mode == "L" and 2 in formats:
        raise ValueError("its pixels have signs, and nothing says which is black: convert it to 8 bits without")


def _refuse_greys(image: Image.Image, numbers: NDArray[np.uint8]) -> None:
    """Raise ValueError if a palette of greys has replaced the map's numbers, as programs do that make files smaller."""
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    greys = palette[numbers, 0] if len(palette) > numbers.max() else numbers
    if (palette == palette[:, :1]).all() and len(set(greys)) == len(greys) and (greys != numbers).any():
        raise ValueError("its palette has other greys than its numbers, and nothing says which count: save it in grey")


def _wide(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to RGB; Pillow's own conversion saturates. ValueError: 32-bit numbers."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    # Some versions of Pillow open 16-bit PNG and PGM files in the 32-bit mode.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(f"its pixels are 32-bit {kind}, and nothing says which is white: convert it to 8 or 16 bits")
    bits = tags.get(258, (16,))[0]
    grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")
