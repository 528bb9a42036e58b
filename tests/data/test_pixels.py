"""Image files as people have them: every kind of pixels and every orientation become one picture, or are refused."""

import struct
import zlib
from pathlib import Path

import folders
import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from kalmannorm.data import pixels
from kalmannorm.data.pixels import Header, Unreadable, read_header, read_rgb, turn, turn_box

COLOUR = folders.image(1)  # [24, 32, 3]
GREY = np.asarray(Image.fromarray(COLOUR).convert("L"))

# What stores a picture without loss, and what stands in the file -> the picture that comes out.
EXACT = {
    "RGB": (Image.fromarray(COLOUR), COLOUR),
    "RGBA": (Image.fromarray(np.dstack((COLOUR, GREY))), COLOUR),
    "L": (Image.fromarray(GREY), GREY),
    "LA": (Image.fromarray(np.dstack((GREY, 255 - GREY))), GREY),
    "1": (Image.fromarray(GREY > 120), (GREY > 120) * np.uint8(255)),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257 // 1), GREY),
}


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pixels_without_loss(tmp_path: Path, mode: str, suffix: str) -> None:
    stored, expected = EXACT[mode]
    file = tmp_path / f"x{suffix}"
    stored.save(file)
    with Image.open(file) as opened:
        assert opened.mode == mode
    found = np.asarray(read_rgb(file))
    assert found.dtype == np.uint8 and found.shape == (24, 32, 3)
    assert (found == (expected if expected.ndim == 3 else expected[..., None])).all()


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.webp", "x.ppm", "x.jpg"])
def test_every_format_gives_the_same_picture(tmp_path: Path, name: str) -> None:
    Image.fromarray(COLOUR).save(tmp_path / name, **({"lossless": True} if name == "x.webp" else {"quality": 98}))
    difference = np.abs(np.asarray(read_rgb(tmp_path / name)).astype(int) - COLOUR)
    assert difference.mean() <= (4 if name == "x.jpg" else 0)


def test_grey_of_16_bits_in_every_form(tmp_path: Path) -> None:
    """Big endian, a portable grey map, white for zero, and the twelve bits of a camera or a scanner."""
    wide = GREY.astype(np.uint16) * 256 + 99
    Image.fromarray(wide.astype(">u2")).save(tmp_path / "big.tif")
    (tmp_path / "x.pgm").write_bytes(b"P5 32 24 65535\n" + wide.astype(">u2").tobytes())
    inverted = ImageFileDirectory_v2()
    inverted[262] = 0
    Image.fromarray(65535 - wide).save(tmp_path / "white.tif", tiffinfo=inverted)
    twelve = (GREY.astype(int) << 4).reshape(-1, 2)
    packed = np.stack((twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255), 1)
    (tmp_path / "twelve.tif").write_bytes(tiff(packed.astype(np.uint8).tobytes(), bits=12))
    for name in ("big.tif", "x.pgm", "white.tif", "twelve.tif"):
        assert (np.asarray(read_rgb(tmp_path / name)) == GREY[..., None]).all(), name


def tiff(content: bytes, bits: int) -> bytes:
    """An uncompressed grey TIFF of 32 x 24 pixels."""
    tags = [(256, 32), (257, 24), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 24), (279, len(content))]
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + listed + b"\0" * 4


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "LAB"])
def test_colours_that_are_converted(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("x.png" if mode == "P" else "x.tif")
    rgb = Image.fromarray(COLOUR)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
        stored = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        stored = rgb.convert(mode)
    stored.save(file)
    assert np.abs(np.asarray(read_rgb(file)).astype(int) - COLOUR).mean() < 20  # a palette of web colours loses most


@pytest.mark.parametrize("values", [np.int32, np.float32])
@pytest.mark.parametrize("scale", [1 / 255, 1, 257])
def test_32_bits_are_refused(tmp_path: Path, values: type, scale: float) -> None:
    """Whether 1 or 255 or 65535 is white stands nowhere in the file."""
    Image.fromarray((GREY.astype(float) * scale).astype(values)).save(tmp_path / "x.tif")
    with pytest.raises(Unreadable, match=r"x\.tif: its pixels are 32-bit .* convert it to 8 or 16 bits"):
        read_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize(("bits", "format", "words"), [(8, 2, "have signs"), (16, 1, "one behind the other")])
def test_what_pillow_would_misread_is_refused(tmp_path: Path, bits: int, format: int, words: str) -> None:
    """As it reads signed bytes, and planes of 16 bits: to another picture."""
    planes = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).astype(f"<u{bits // 8}")
    size, count = planes.nbytes // 3, 3 if bits == 16 else 1
    offsets, sizes = [8 + i * size for i in range(count)], [size] * count
    tags = {256: [32], 257: [24], 258: [bits] * count, 259: [1], 262: [2 if count == 3 else 1], 273: offsets}
    tags |= {277: [count], 278: [24], 279: sizes, 284: [2], 339: [format] * count}
    entries, more, end = b"", b"", 8 + planes.nbytes + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHI", tag, 4, len(values))
        entries += packed if len(values) == 1 else struct.pack("<I", end + len(more))
        more += packed if len(values) > 1 else b""
    head = b"II*\0" + struct.pack("<I", 8 + planes.nbytes) + planes.tobytes() + struct.pack("<H", len(tags))
    (tmp_path / "x.tif").write_bytes(head + entries + b"\0" * 4 + more)
    with pytest.raises(Unreadable, match=words):
        read_rgb(tmp_path / "x.tif")


# Orientation ---------------------------------------------------------------------------------------------------------

STORED = {  # the stored pixels of a picture whose upright form is `upright`, after EXIF's table, by Pillow's words
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "x.jpg"])
def test_pictures_stand_upright(tmp_path: Path, orientation: int, name: str) -> None:
    upright = Image.fromarray(COLOUR)
    method = STORED[orientation]
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = orientation
    stored.save(tmp_path / name, exif=exif, **({"lossless": True} if name == "x.webp" else {"quality": 98}))
    found = np.asarray(read_rgb(tmp_path / name)).astype(int)
    assert found.shape == COLOUR.shape and np.abs(found - COLOUR).mean() <= (4 if name == "x.jpg" else 0)
    header = read_header(tmp_path / name)
    assert header == Header(*stored.size, orientation) and header.upright == (32, 24)


def test_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.fromarray(COLOUR).save(file)
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    whole, end = file.read_bytes()[:-12], file.read_bytes()[-12:]
    file.write_bytes(whole + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end)
    assert read_header(file).orientation == 6 and read_rgb(file).size == (24, 32)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_means_nothing(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = value
    Image.fromarray(COLOUR).save(tmp_path / "x.jpg", exif=exif)
    Image.fromarray(COLOUR).save(tmp_path / "y.jpg", exif=b"Exif\0\0garbage")
    for name in ("x.jpg", "y.jpg"):
        assert read_header(tmp_path / name).orientation == 1 and read_rgb(tmp_path / name).size == (32, 24)


@pytest.mark.parametrize("orientation", STORED)
def test_boxes_turn_with_their_pixels(orientation: int) -> None:
    mask = np.zeros((24, 32), dtype=np.uint8)
    mask[3:10, 5:25] = 1
    rows, columns = np.nonzero(turn(mask, orientation))
    found = turn_box((5, 3, 20, 7), Header(32, 24, orientation))
    assert found == (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)


# Hostile files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.eps"])
def test_postscript_is_not_handed_to_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever the file is called: a program called gs on the path would leave a mark."""
    ran = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\nshowpage\n")
    with pytest.raises(Unreadable, match="none of JPEG, PNG"):
        read_rgb(tmp_path / name)
    assert not ran.exists()


@pytest.mark.parametrize("format", ["GIF", "PDF", "ICO", "PCX", "TGA", "SGI", "JPEG2000", "DDS"])
def test_other_formats_are_refused_by_content(tmp_path: Path, format: str) -> None:
    file = tmp_path / "x.png"
    try:
        Image.fromarray(COLOUR).save(file, format)
    except OSError as error:
        pytest.skip(str(error))
    with pytest.raises(Unreadable, match="none of JPEG, PNG"):
        read_rgb(file)


@pytest.mark.parametrize("side", [9_500, 60_000])
def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    for read in (read_rgb, read_header):
        with pytest.raises(Unreadable, match=r"x\.png: .*pixels"):
            read(tmp_path / "x.png")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "y.jpg").mkdir()
    (tmp_path / "z.jpg").symlink_to(tmp_path / "z.jpg")
    for name in ("x.jpg", "y.jpg", "z.jpg", "none.jpg"):
        with pytest.raises(Unreadable, match=name):
            read_rgb(tmp_path / name)
