"""COCO's instances files as tools write them: filled in, put in one form, or named with their annotation."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coco_files
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_length

from kalmannorm.data import coco
from kalmannorm.data.annotations import _runs
from kalmannorm.data.pixels import ORIENTATION, turn
from kalmannorm.errors import UserError
from kalmannorm.train.average_precision import average_precision

Change = Callable[[dict[str, Any]], None]


def written(root: Path, change: Change) -> Path:
    """A small set whose two files are changed alike."""
    folder = coco_files.write(root)
    for file in (folder / "annotations").iterdir():
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return folder


def load(root: Path) -> coco.Coco:
    return coco.load("coco", root, 3)


def perfect(found: coco.Coco) -> dict[str, Any]:
    """AP of the validation set's own objects as detections."""
    split = found.test
    detections = [
        {key: a[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 1.0}
        for a in split.coco.anns.values()
        if not a["iscrowd"]
    ]
    return average_precision(split, split.ids, detections)


def each(change: Change) -> Change:
    def whole(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            change(annotation)

    return whole


def first(**values: Any) -> Change:
    return lambda content: content["annotations"][0].update(values)


def without(key: str) -> Change:
    return each(lambda annotation: annotation.pop(key, None))


# Filled in and renumbered ---------------------------------------------------------------------------------------------


def from_zero(content: dict[str, Any]) -> None:
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number


def floats(content: dict[str, Any]) -> None:
    """As a table library writes a column with a gap."""
    for image in content["images"]:
        image |= {key: float(image[key]) for key in ("id", "width", "height")}
    for annotation in content["annotations"]:
        annotation |= {key: float(annotation[key]) for key in ("id", "image_id", "category_id")}


def negative(content: dict[str, Any]) -> None:
    for kind, key in (("images", "id"), ("annotations", "image_id")):
        for entry in content[kind]:
            entry[key] -= 1014  # one of them is 0


def sizeless(content: dict[str, Any]) -> None:
    for image in content["images"]:
        del image["width"], image["height"]


@pytest.mark.parametrize(
    "change",
    [
        without("id"), without("iscrowd"), without("area"), from_zero, floats, negative, sizeless,
        each(lambda a: a.update(id=7)), each(lambda a: a.update(id=2**70)), each(lambda a: a.update(id="a")),
        each(lambda a: a.update(iscrowd=False)), each(lambda a: a.update(area=None)),
    ],
)  # fmt: skip
def test_perfect_detections_have_ap_100(tmp_path: Path, change: Change) -> None:
    written(tmp_path, change)
    found = perfect(load(tmp_path))
    assert found["box_ap"] == found["mask_ap"] == pytest.approx(100, abs=1e-9)


def test_what_is_left_out_is_what_pycocotools_computes(tmp_path: Path) -> None:
    written(tmp_path, lambda content: [a.pop(key, None) for a in content["annotations"] for key in ("area", "iscrowd")])
    for annotation in load(tmp_path).train.coco.anns.values():
        assert annotation["area"] == run_length.decode(annotation["segmentation"]).sum() and annotation["iscrowd"] == 0


def test_names_of_categories_may_be_missing(tmp_path: Path) -> None:
    written(tmp_path, lambda content: [category.pop("name") for category in content["categories"]])
    assert {category["name"] for category in load(tmp_path).train.coco.cats.values()} == {"1", "7", "44"}


def test_images_in_folders(tmp_path: Path) -> None:
    folder = written(tmp_path, lambda content: [i.update(file_name=f"a/b/{i['file_name']}") for i in content["images"]])
    for split in coco.SPLITS:
        (folder / split / "a" / "b").mkdir(parents=True)
        for image in (folder / split).glob("*.jpg"):
            image.rename(folder / split / "a" / "b" / image.name)
    found = load(tmp_path)
    assert coco.Images(found.train, found.labels)[0, False, 0][0].shape == (3, 48, 64)


# Masks of every form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["polygons", "counts", "string"])
def test_every_form_of_mask_is_one_mask(tmp_path: Path, form: str) -> None:
    folder = coco_files.write(tmp_path)
    before = load(tmp_path)
    expected = {a["id"]: run_length.decode(a["segmentation"]) for a in before.train.coco.anns.values()}
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for number, annotation in enumerate(content["annotations"], 1):
        mask = expected[number]
        if form == "string":
            code = run_length.encode(np.asfortranarray(mask))
            annotation["segmentation"] = {"size": list(mask.shape), "counts": code["counts"].decode()}
        elif form == "counts":
            flat = mask.T.flatten()
            edges = np.flatnonzero(np.diff(np.concatenate(([0], flat, [1 - flat[-1]]))))
            annotation["segmentation"] = {"size": list(mask.shape), "counts": np.diff(edges, prepend=0).tolist()}
        else:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    file.write_text(json.dumps(content))
    after = load(tmp_path)
    for number, mask in expected.items():
        assert (run_length.decode(after.train.coco.anns[number]["segmentation"]) == mask).all()


def test_codes_are_read_as_pycocotools_writes_them() -> None:
    random = np.random.RandomState(0)
    for height, width, density in ((1, 1, 0.5), (7, 5, 0.5), (300, 200, 0.01), (500, 400, 0.0), (64, 48, 0.99)):
        mask = np.asfortranarray((random.rand(height, width) < density).astype(np.uint8))
        flat = mask.T.flatten()
        runs = np.diff(np.concatenate(([0], np.flatnonzero(np.diff(flat)) + 1, [len(flat)])))
        expected = np.concatenate(([0], runs)) if flat[0] else runs
        assert _runs(run_length.encode(mask)["counts"].decode()) == expected.tolist()


def test_points_beside_a_polygon_are_said_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, first(segmentation=[[4, 4], [8, 8, 20, 8, 20, 20, 8, 20], [1, 1, 3, 3]]))
    mask = run_length.decode(load(tmp_path).train.coco.anns[1]["segmentation"])
    assert mask.sum() == mask[8:20, 8:20].sum() == 144
    said = capsys.readouterr().err
    assert "annotation 1 has points or lines among its polygons" in said and said.count("\n") == 2  # two files


def test_a_box_of_corners_that_lies_inside_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, first(bbox=[20, 8, 26, 14], segmentation=[[20, 8, 26, 8, 26, 14, 20, 14]]))
    load(tmp_path)
    assert "annotation 1 has the box [20, 8, 26, 14], elsewhere than its mask" in capsys.readouterr().err
    written(tmp_path / "right", first(bbox=[19.6, 8.4, 6.3, 5.9], segmentation=[[20, 8, 26, 8, 26, 14, 20, 14]]))
    load(tmp_path / "right")
    assert not capsys.readouterr().err


def test_a_category_has_one_name(tmp_path: Path) -> None:
    folder = coco_files.write(tmp_path)
    file = folder / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][1]["name"] = "other"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"category 1 of .* is 'kind 1' in train2017 and 'other' in val2017"):
        load(tmp_path)


def test_an_object_without_a_pixel_is_said_and_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, first(segmentation=[[8, 8, 8.1, 8, 8.1, 8.1]]))
    found = load(tmp_path)
    assert "annotation 1 has a mask without a single pixel: not trained on" in capsys.readouterr().err
    _, target = coco.Images(found.train, found.labels)[0, False, 0]
    assert len(target["masks"]) == 1 and target["masks"].flatten(1).sum(1).min() > 0


# Pictures that are stored turned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_turn_with_the_picture(tmp_path: Path, orientation: int) -> None:
    folder = coco_files.write(tmp_path)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for file in folder.glob("*/*.jpg"):
        Image.open(file).save(file, exif=exif, quality=95)
    found = load(tmp_path)
    loaded = coco.Images(found.train, found.labels)
    colours = {found.labels[category]: colour for category, colour in coco_files.COLOURS.items()}
    shown = 0
    for position in found.train_images:
        image, target = loaded[position, False, 0]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            rows, columns = torch.where(mask > 0)
            edges = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert mask.shape == image.shape[1:] and (edges - box).abs().max() <= 1
            colour = image[:, mask > 0].float().median(1).values
            shown += bool((colour - torch.tensor(colours[int(label)])).abs().max() < 40)
    assert shown >= 11
    assert perfect(found)["mask_ap"] == pytest.approx(100, abs=1e-9)


@pytest.mark.parametrize("orientation", range(5, 9))
def test_annotations_of_the_upright_picture_stay(tmp_path: Path, orientation: int) -> None:
    """Where the listed size is the upright one, tools have annotated what they show."""
    folder = coco_files.write(tmp_path)
    before = load(tmp_path)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    back = {5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    for file in folder.glob("*/*.jpg"):
        Image.fromarray(turn(np.asarray(Image.open(file)), back)).save(file, exif=exif, quality=95)
    after = load(tmp_path)
    for old, new in zip(before.train.coco.anns.values(), after.train.coco.anns.values(), strict=True):
        assert old == new
    (a, _), (b, _) = (coco.Images(found.train, found.labels)[0, False, 0] for found in (before, after))
    assert a.shape == b.shape and (a.int() - b.int()).abs().float().mean() < 4


# Named and refused ----------------------------------------------------------------------------------------------------

SQUARE = [[8, 8, 20, 8, 20, 20, 8, 20]]
WRONG: dict[str, tuple[Change, str]] = {
    "flat list": (first(segmentation=SQUARE[0]), r"annotation 1 has 8 among its polygons.*\[\[x, y"),
    "line": (first(segmentation=[[8, 8, 20, 20]]), "annotation 1 has no mask .*three points"),
    "point": (first(segmentation=[[8, 8]]), "annotation 1 has no mask .*three points"),
    "empty polygon": (first(segmentation=[[]]), "annotation 1 has no mask"),
    "no polygon": (first(segmentation=[]), "annotation 1 has no mask"),
    "no segmentation": (lambda c: c["annotations"][0].pop("segmentation"), "annotation 1 has no mask"),
    "null": (first(segmentation=None), "annotation 1 has no mask"),
    "odd": (first(segmentation=[[8, 8, 20, 8, 20, 20, 8]]), "annotation 1 .* pairs"),
    "words": (first(segmentation=[["8", "8", "20", "8", "20", "20"]]), "annotation 1 .* numbers"),
    "points": (first(segmentation=[[[8, 8], [20, 8], [20, 20]]]), "annotation 1 .* pairs"),
    "nan": (first(segmentation=[[8, 8, 20, 8, float("nan"), 20]]), "annotation 1 .* numbers"),
    "far": (first(segmentation=[[8, 8, 1e12, 8, 20, 20]]), "annotation 1 .*far outside"),
    "text": (first(segmentation="PPYo0"), "annotation 1 has the segmentation 'PPYo0'"),
    "codes in a list": (first(segmentation=[{"size": [48, 64], "counts": [3072]}]), "annotation 1 has .*among"),
    "without size": (first(segmentation={"counts": [3072]}), "annotation 1 has the segmentation"),
    "width first": (first(segmentation={"size": [64, 48], "counts": [0, 3072]}), r"annotation 1 .*size \[64, 48\]"),
    "too short": (first(segmentation={"size": [48, 64], "counts": [5, 10]}), "annotation 1 .*none of 48 x 64"),
    "too long": (first(segmentation={"size": [48, 64], "counts": [3000, 73]}), "annotation 1 .*none of"),
    "negative": (first(segmentation={"size": [48, 64], "counts": [-1, 3073]}), "annotation 1 .*none of"),
    "fractions": (first(segmentation={"size": [48, 64], "counts": [0.5, 3071.5]}), "annotation 1 .*none of"),
    "no code": (first(segmentation={"size": [48, 64], "counts": "abc"}), "annotation 1 .*none of"),
    "no letters": (first(segmentation={"size": [48, 64], "counts": "größe ü"}), "annotation 1 .*none of"),
    "cut code": (first(segmentation={"size": [48, 64], "counts": "PPYo"}), "annotation 1 .*none of"),
    "empty code": (first(segmentation={"size": [48, 64], "counts": ""}), "annotation 1 .*none of"),
    "endless code": (first(segmentation={"size": [48, 64], "counts": "o" * 5000 + "0"}), "annotation 1 .*none of"),
    "box of words": (first(bbox=["4", "4", "18", "16"]), "annotation 1 has the box .* numbers"),
    "box of three": (first(bbox=[4, 4, 18]), "annotation 1 has the box"),
    "no box": (without("bbox"), "annotation 1 has the box None"),
    "box of nan": (first(bbox=[float("nan"), 4, 18, 16]), "annotation 1 has the box"),
    "box of corners": (first(bbox=[40, 30, 60, 44]), "annotation 1 has the box .*outside"),
    "negative box": (first(bbox=[20, 20, -10, 5]), "annotation 1 has the box .*outside"),
    "crowd": (first(iscrowd=2), "annotation 1 has iscrowd 2"),
    "crowd in words": (first(iscrowd="no"), "annotation 1 has iscrowd 'no'"),
    "area": (first(area=-4), "annotation 1 has the area -4"),
    "area of nan": (first(area=float("nan")), "annotation 1 has the area"),
    "area in words": (first(area="much"), "annotation 1 has the area 'much'"),
    "foreign image": (first(image_id=4), "annotation 1 is of image 4 .*does not list"),
    "image in words": (first(image_id="1000"), "annotation 1 is of image '1000'"),
    "foreign category": (first(category_id=4), "annotation 1 is of .*category 4.*does not list"),
    "no object": (lambda c: c["annotations"].insert(0, 5), "annotation 1 is a int"),
    "image twice": (lambda c: c["images"].append(c["images"][0]), "images entry .*has the id 1000 of another"),
    "image without id": (lambda c: c["images"][0].pop("id"), "images entry 1 has the id None"),
    "image without name": (lambda c: c["images"][0].pop("file_name"), "images entry 1 has the file_name None"),
    "image elsewhere": (lambda c: c["images"][0].update(file_name="../x.jpg"), "images entry 1 .*outside"),
    "absolute": (lambda c: c["images"][0].update(file_name="/etc/passwd"), "images entry 1 .*outside"),
    "size in words": (lambda c: c["images"][0].update(width="64"), "images entry 1 .*width '64'"),
    "size of 0": (lambda c: c["images"][0].update(height=0), "images entry 1 .*height 0"),
    "category twice": (lambda c: c["categories"].append(c["categories"][0]), "categories entry 4 has the id"),
    "file twice": (lambda c: c["images"][3].update(file_name="./000000000000.jpg"), "1000 and 1021 are one file"),
    "no list": (lambda c: c.update(annotations={}), "no list of 'annotations'"),
    "other format": (lambda c: c.clear(), "no list of 'images'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_when_the_set_is_loaded(tmp_path: Path, name: str) -> None:
    change, words = WRONG[name]
    written(tmp_path, change)
    with pytest.raises(UserError, match=words) as error, contextlib.redirect_stderr(io.StringIO()):
        load(tmp_path)
    assert "\n" not in str(error.value) and "instances_train2017.json" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"[]", b'{"images": 1}', b"%!PS"])
def test_what_is_no_annotation_file_is_named(tmp_path: Path, content: bytes) -> None:
    folder = coco_files.write(tmp_path)
    (folder / "annotations" / "instances_val2017.json").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*instances_val2017\.json.*COCO's instances format"):
        load(tmp_path)


def test_all_that_is_wrong_is_counted(tmp_path: Path) -> None:
    written(tmp_path, without("bbox"))
    with pytest.raises(UserError, match=r"annotation 1 .*; annotation 2 .*; annotation 3 .*; and 10 more like these;"):
        load(tmp_path)


def test_a_file_that_is_damaged_later_is_named_by_workers_too(tmp_path: Path) -> None:
    folder = coco_files.write(tmp_path)
    found = load(tmp_path)
    for file in (folder / "train2017").iterdir():
        file.write_bytes(file.read_bytes()[:400])
    batches = coco.TrainingBatches(
        found, found.train_images, batch=2, size=(64, 96), seed=3, device=torch.device("cpu"), workers=1
    )
    with pytest.raises(UserError, match=r"cannot read .*\.jpg: .*get the image again") as error:
        list(batches.epoch(0))
    assert "\n" not in str(error.value)
