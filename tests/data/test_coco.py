"""COCO's files: what is read, what is left out, what is refused; batches and their draws."""

import json
import shutil

import coco_files
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from kalmannorm.data import coco
from kalmannorm.data.batches import choose_subset
from kalmannorm.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    coco_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def images(root):
    return coco.load("coco", root, 3)


def batches(images, **options):
    given = {"batch": 2, "size": (64, 96), "seed": 3, "device": CPU} | options
    return coco.TrainingBatches(images, images.train_images, **given)


def test_crowds_and_empty_images_are_not_trained_on(images):
    assert len(images.train.ids) == 8 and images.train_images == [0, 1, 2, 3, 4, 5]
    assert images.labels == {1: 1, 7: 2, 44: 3}
    assert "not the published" in images.provenance["fidelity"] and len(images.provenance["sha256"]) == 64


@pytest.mark.parametrize("flipped", [False, True])
def test_boxes_and_masks_lie_on_their_objects(images, flipped):
    """Polygons and run-length codes alike: pixels under a mask have the object's colour, and the box is the mask's."""
    loaded = coco.Images(images.train, images.labels)
    colours = {images.labels[category]: colour for category, colour in coco_files.COLOURS.items()}
    shown = 0
    for position in images.train_images:
        image, target = loaded[position, flipped, 5]
        assert image.dtype == torch.uint8 and target["key"] == 5
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            rows, columns = torch.where(mask > 0)
            edges = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert (edges - box).abs().max() <= 1, (position, edges, box)
            colour = image[:, mask > 0].float().median(1).values
            shown += bool((colour - torch.tensor(colours[int(label)])).abs().max() < 40)
    assert shown >= 11  # of 12 objects; one may lie under another


def test_what_a_step_draws_depends_on_seed_epoch_and_image_alone(images):
    one = batches(images, batch=4)
    whole = [target["key"] for batch in one.epoch(2) for target in batch.targets]
    dealt = [list(batches(images, batch=4, shard=(rank, 2)).epoch(2)) for rank in (0, 1)]
    both = [
        target["key"] for pair in zip(*dealt, strict=True) for i in range(2) for p in pair for target in [p.targets[i]]
    ]
    assert whole == both
    assert [batch.canvas for batch in dealt[0]] == [batch.canvas for batch in one.epoch(2)]
    rest = [target["key"] for batch in batches(images).epoch(2, 1) for target in batch.targets]
    assert rest == [target["key"] for batch in batches(images).epoch(2) for target in batch.targets][2:]
    assert {t["key"] for b in batches(images).epoch(0) for t in b.targets}.isdisjoint(whole)


def test_batches_are_of_one_orientation_and_hold_each_image_once(images):
    found = batches(images)
    for epoch in range(3):
        order = found.order(epoch)
        assert len(order) == found.steps_per_epoch == 3
        assert sorted(i for batch in order for i in batch) == list(range(6))
        mixed = [len({found.shapes[i][1] >= found.shapes[i][0] for i in batch}) > 1 for batch in order]
        assert sum(mixed) == 0  # 4 wide, 2 tall
    assert found.order(0) != found.order(1)


@pytest.mark.parametrize("shape", [(480, 640), (427, 640), (640, 360), (333, 500), (37, 511), (612, 612)])
def test_the_canvas_is_torchvisions_size(shape):
    for size, longest in ((800, 1333), (128, 192), (400, 672)):
        transform = GeneralizedRCNNTransform(size, longest, [0.0] * 3, [1.0] * 3)
        resized, _ = transform([torch.zeros(3, *shape)])
        assert tuple(resized.image_sizes[0]) == coco.resized(*shape, size, longest)


def test_a_subset_is_always_the_same():
    assert choose_subset(list(range(10, 90)), 4) == choose_subset(list(range(10, 90)), 4)
    with pytest.raises(UserError, match="subset of 9"):
        choose_subset([1, 2, 3], 9)


def damage(folder, change):
    file = folder / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def outside(content):
    content["annotations"][0]["bbox"][2] = 300.0


def maskless(content):
    content["annotations"][0]["segmentation"] = []


def foreign(content):
    content["annotations"][0]["image_id"] = 4


def objectless(content):
    content["annotations"].clear()


def keyless(content):
    del content["annotations"]


def other_size(content):
    for image in content["images"]:
        image["width"] += 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, ["annotation 1", "300.0", "outside of its image", "64 x 48"]),
        (maskless, ["annotation 1", "no mask"]),
        (foreign, ["annotation 1", "does not list"]),
        (objectless, ["instances_val2017.json", "no image with an object to evaluate by"]),
        (keyless, ["instances_val2017.json", "annotations"]),
    ],
)
def test_bad_annotations_are_named(tmp_path, change, words):
    damage(coco_files.write(tmp_path), change)
    with pytest.raises(UserError) as error:
        coco.load("coco", tmp_path, 3)
    assert all(word in str(error.value) for word in words), error.value


def test_damaged_files_are_named(tmp_path):
    folder = coco_files.write(tmp_path)
    with pytest.raises(UserError, match="3 categories, expected 80"):
        coco.load("coco", tmp_path, 80)
    loaded = coco.load("coco", tmp_path, 3)
    (folder / "train2017" / "000000000001.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"000000000001\.jpg"):
        coco.Images(loaded.train, loaded.labels)[1, False, 0]
    shutil.copy(folder / "train2017" / "000000000000.jpg", folder / "train2017" / "000000000001.jpg")
    with pytest.raises(UserError, match=r"000000000001\.jpg has 64 x 48 pixels, its annotations say 48 x 64"):
        coco.load("coco", tmp_path, 3)
    (folder / "train2017" / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000001.jpg, which is not in .*train2017"):
        coco.load("coco", tmp_path, 3)
    Image.new("RGB", (48, 64)).save(folder / "train2017" / "000000000001.jpg")
    damage(folder, other_size)
    with pytest.raises(UserError, match=r"65 x 48.* and 2 more like these"):
        coco.load("coco", tmp_path, 3)
    (folder / "val2017" / "000000000002.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000002.jpg, which is not in"):
        coco.load("coco", tmp_path, 3)
    (folder / "annotations" / "instances_train2017.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"cannot read .*instances_train2017.json"):
        coco.load("coco", tmp_path, 3)
    with pytest.raises(UserError, match=r"cocodataset.org"):
        coco.load("coco-none", tmp_path, 3)


def test_a_change_of_an_image_changes_the_provenance(tmp_path):
    folder = coco_files.write(tmp_path)
    before = coco.load("coco", tmp_path, 3).provenance["sha256"]
    with (folder / "val2017" / "000000000000.jpg").open("ab") as file:
        file.write(b"\0")
    assert coco.load("coco", tmp_path, 3).provenance["sha256"] != before
