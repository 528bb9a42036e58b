"""Read COCO's instances files as people and tools write them, check them, and bring them to one form.

All that training and evaluation will read is checked when a set is loaded, so that no training of days fails in its
evaluation. Optional fields are filled in: `iscrowd` 0, `area` from the mask (as pycocotools does), an image's size from
its file. Every mask becomes a run-length code; masks and boxes are turned with the upright picture (pixels.py).
Annotations are renumbered from 1, since pycocotools takes the id 0 for "no match" and equal ids for one object.
"""

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as run_length
from pycocotools.coco import COCO

from kalmannorm.data.pixels import Header, Unreadable, read_header, turn, turn_box
from kalmannorm.errors import UserError, reason

LISTS = ("images", "annotations", "categories")
OUTSIDE = 2.0  # pixels by which a box may exceed its image: the official boxes are rounded
THREADS = 8  # for opening image files, which on a file server is mostly waiting
SHOWN = 3  # problems in a message

Values = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """One split: the images' folder, their annotations, and their ids, ascending. A position is an index into `ids`."""

    root: Path
    coco: COCO
    ids: list[int]

    def image(self, position: int) -> Values:
        return dict(self.coco.imgs[self.ids[position]])

    def annotations(self, position: int) -> list[Values]:
        return list(self.coco.imgToAnns[self.ids[position]])


class _Invalid(ValueError):
    """A problem with an entry; the message continues a sentence that begins with the entry's name."""


def read(file: Path, root: Path) -> Split:
    """Read the split that an instances file describes, with its images in `root`. UserError: names the first problems,
    each with its entry's id, and the number of others."""
    content = _parse(file)
    problems: list[str] = []
    categories = {one["id"]: one for one in _checked(content, "categories", _category, problems)}
    listed = {one["id"]: one for one in _checked(content, "images", _image, problems)}
    images = _with_headers(listed, root, problems)
    notes: list[str] = []
    annotations = list(_annotations(content["annotations"], images, categories, problems, notes))
    if problems:
        more = f"; and {len(problems) - SHOWN:,} more like these" if len(problems) > SHOWN else ""
        raise UserError(f"{file}: {'; '.join(problems[:SHOWN])}{more}; correct or delete what is named")
    if notes:
        more = f" and {len(notes) - 1:,} more like it" if len(notes) > 1 else ""
        print(f"kalmannorm: {file}: {notes[0]}{more}", file=sys.stderr)
    coco = COCO()
    shown = [image for image, _, _ in images.values()]
    coco.dataset = {"images": shown, "annotations": annotations, "categories": list(categories.values())}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports to the terminal
        coco.createIndex()
    return Split(root, coco, sorted(images))


def _parse(file: Path) -> dict[str, list[object]]:
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        for key in LISTS:
            if not isinstance(content.get(key), list):
                raise ValueError(f"no list of {key!r}")
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        remedy = "expected COCO's instances format, get the file again"
        raise UserError(f"cannot read {file}: {reason(error)}; {remedy}") from None
    return content


# Images and categories ------------------------------------------------------------------------------------------------


def _checked(
    content: dict[str, list[object]], kind: str, check: Callable[[Values], Values], problems: list[str]
) -> Iterator[Values]:
    """Yield the valid entries of a list, with integer ids; add the others to `problems`."""
    known = set()
    for number, entry in enumerate(content[kind]):
        what = f"{kind} entry {number + 1}"
        try:
            if not isinstance(entry, dict):
                raise _Invalid(f"is a {type(entry).__name__}, expected an object")
            if (identity := _integer(entry.get("id"))) is None:
                raise _Invalid(f"has the id {entry.get('id')!r}, expected an integer")
            if identity in known:
                raise _Invalid(f"has the id {identity} of another one: annotations cannot tell them apart")
            known.add(identity)
            yield check({**entry, "id": identity})
        except _Invalid as wrong:
            problems.append(f"{what} {wrong}")


def _category(category: Values) -> Values:
    return {**category, "name": str(category.get("name", category["id"]))}


def _image(image: Values) -> Values:
    name = image.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise _Invalid(f"has the file_name {name!r}, expected that of an image file")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _Invalid(f"has the file_name {name}, which leads outside of its folder")
    for key in ("width", "height"):
        given = image.get(key)
        if given is not None and (_integer(given) or 0) < 1:
            raise _Invalid(f"({name}) has the {key} {given!r}, expected a number of pixels")
    return image


Known = tuple[Values, Header, bool]  # an image, its file's header, whether its annotations must be turned


def _with_headers(images: dict[int, Values], root: Path, problems: list[str]) -> dict[int, Known]:
    """Return the images whose files exist and have the listed size; the size becomes that of the upright picture."""

    def header(image: Values) -> Header | Unreadable:
        try:
            return read_header(root / image["file_name"])
        except Unreadable as error:
            return error

    known: dict[int, Known] = {}
    by_file: dict[PurePosixPath, int] = {}
    with ThreadPool(THREADS) as pool:
        for image, found in zip(images.values(), pool.imap(header, images.values(), chunksize=64), strict=True):
            name, identity = image["file_name"], image["id"]
            if (other := by_file.setdefault(PurePosixPath(name), identity)) != identity:
                # Training on each would teach that the other's objects are background.
                problems.append(f"images {other} and {identity} are one file, {name}")
            if isinstance(found, Unreadable):
                there = (root / name).exists()
                problems.append(str(found) if there else f"it names {name}, which is not in {root}")
                continue
            width, height = (image.get(key) for key in ("width", "height"))
            stored, upright = (found.width, found.height), found.upright
            listed = (stored[0] if width is None else int(width), stored[1] if height is None else int(height))
            if listed not in (stored, upright):
                sizes = f"{stored[0]} x {stored[1]} pixels, its annotations say {listed[0]} x {listed[1]}"
                problems.append(f"{root / name} has {sizes}")
                continue
            # If both sizes are equal (a half turn), annotations are taken to lie on the stored pixels.
            known[identity] = ({**image, "width": upright[0], "height": upright[1]}, found, listed == stored)
    return known


# Annotations ----------------------------------------------------------------------------------------------------------


def _annotations(
    entries: list[object],
    images: dict[int, Known],
    categories: dict[int, Values],
    problems: list[str],
    notes: list[str],
) -> Iterator[Values]:
    """Yield the valid annotations in one form, numbered from 1; add to `problems`, and oddities to `notes`."""
    bad_images = bool(problems)  # then an annotation of an unlisted image is no further problem
    for number, entry in enumerate(entries):
        what = f"annotation {entry.get('id', f'number {number + 1}') if isinstance(entry, dict) else number + 1}"
        try:
            if not isinstance(entry, dict):
                raise _Invalid(f"is a {type(entry).__name__}, expected an object")
            image, category = _integer(entry.get("image_id")), _integer(entry.get("category_id"))
            if image not in images or category not in categories:
                if bad_images:
                    continue
                named = f"image {entry.get('image_id')!r} and category {entry.get('category_id')!r}"
                raise _Invalid(f"is of {named}, one of which the file does not list")
            same = {"id": number + 1, "image_id": image, "category_id": category}
            found = {**entry, **same, **_object(entry, *images[image])}
        except _Invalid as wrong:
            problems.append(f"{what} {wrong}")
            continue
        if isinstance(entry["segmentation"], list) and any(len(polygon) < 6 for polygon in entry["segmentation"]):
            notes.append(f"{what} has points or lines among its polygons, which have no area: left out")
        elif not found["iscrowd"] and not run_length.area(found["segmentation"]):
            notes.append(f"{what} has a mask without a single pixel: not trained on")
        elif _box_off_mask(found):
            box = entry["bbox"]
            notes.append(f"{what} has the box {box}, elsewhere than its mask: is it [left, top, width, height]?")
        yield found


def _object(entry: Values, image: Values, header: Header, turned: bool) -> Values:
    """Return box, mask, area and crowd flag of an annotation, on the upright picture."""
    width, height = (header.width, header.height) if turned else header.upright
    box = _box(entry.get("bbox"), width, height, image["file_name"])
    if not entry.get("segmentation"):
        raise _Invalid("has no mask (segmentation): expected polygons or a run-length code")
    mask = _mask(entry["segmentation"], height, width)
    if turned and header.orientation != 1:
        box = turn_box(box, header)
        mask = run_length.encode(np.asfortranarray(turn(run_length.decode(mask), header.orientation)))
    crowd, area = entry.get("iscrowd"), entry.get("area")
    if crowd is not None and crowd not in (0, 1):
        raise _Invalid(f"has iscrowd {crowd!r}, expected 0 or 1")
    if area is None:
        area = float(run_length.area(mask))
    elif not _is_number(area) or area < 0:
        raise _Invalid(f"has the area {area!r}, expected a number of pixels; without one it is the mask's")
    return {"bbox": list(box), "segmentation": mask, "iscrowd": int(crowd or 0), "area": area}


def _box_off_mask(annotation: Values) -> bool:
    """Say whether box and mask lie in different places. Small boxes, rounded by up to half of their size, never do."""
    box = np.array([annotation["bbox"]], dtype=np.float64)
    around = run_length.toBbox([annotation["segmentation"]])
    return box[0, 2:].min() >= 4 and float(run_length.iou(box, around, [0])[0, 0]) < 0.5


def _box(box: object, width: int, height: int, name: str) -> tuple[float, float, float, float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise _Invalid(f"has the box {_short(box)}, expected the numbers [left, top, width, height]")
    x, y, w, h = box
    inside = min(x, y) >= -OUTSIDE and x + w <= width + OUTSIDE and y + h <= height + OUTSIDE
    if not inside or min(w, h) < 0:
        raise _Invalid(f"has the box {box}, outside of its image {name} of {width} x {height} pixels")
    return x, y, w, h


def _mask(segmentation: object, height: int, width: int) -> Values:
    """Bring every form of COCO's masks to a compressed run-length code."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if _is_polygon(polygon, height, width)]
        if not polygons:
            raise _Invalid("has no mask (segmentation): none of its polygons has the three points of an area")
        return dict(run_length.merge(run_length.frPyObjects(polygons, height, width)))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise _Invalid(f"has the segmentation {_short(segmentation)}, expected polygons or a run-length code")
    if segmentation["size"] != [height, width]:
        size, expected = _short(segmentation["size"]), f"its image's [height, width] {[height, width]}"
        raise _Invalid(f"has a run-length code of size {size}, expected {expected}")
    counts = segmentation["counts"]
    runs = _runs(counts) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != height * width:
        raise _Invalid(f"has the run-length code {_short(counts)}, which is none of {height} x {width} pixels")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode()}
    return dict(run_length.frPyObjects(segmentation, height, width))


def _is_polygon(polygon: object, height: int, width: int) -> bool:
    """Say whether a polygon has an area; points and lines, which some tools write among polygons, have none."""
    if not isinstance(polygon, list):
        hint = "; a single polygon stands in a list of its own: [[x, y, ...]]" if _is_number(polygon) else ""
        raise _Invalid(f"has {_short(polygon)} among its polygons, expected lists [x, y, x, y, ...]{hint}")
    if len(polygon) % 2 or not all(map(_is_number, polygon)):
        raise _Invalid(f"has the polygon {_short(polygon)}, expected numbers in pairs: [x, y, x, y, ...]")
    # pycocotools allocates memory in proportion to the length of a polygon's sides.
    inside_x = all(-width <= x <= 2 * width for x in polygon[::2])
    inside_y = all(-height <= y <= 2 * height for y in polygon[1::2])
    if not (inside_x and inside_y):
        raise _Invalid(f"has the polygon {_short(polygon)}, far outside of its image of {width} x {height} pixels")
    return len(polygon) >= 6


def _runs(text: str) -> list[int]:
    """Return the runs of a compressed code, [] if it is invalid; pycocotools decodes any string without an error.

    Each character, from "0" on, holds six bits: five bits of a number (lowest first, two's complement), and one that
    says that more follow. From the fourth run on, the number is the difference to the last run but one.
    """
    runs: list[int] = []
    value = place = 0
    for code in text.encode("latin-1", "replace"):
        if not 0 <= (code := code - 48) < 64 or place > 30:
            return []
        value |= (code & 31) << place
        place += 5
        if not code & 32:
            negative = 1 << place if code & 16 else 0
            runs.append(value - negative + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    return [] if place else runs


def _integer(value: object) -> int | None:
    """Return an integer as int, also if it is written 7.0, as some tools do; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
