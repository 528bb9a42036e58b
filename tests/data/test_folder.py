"""Image folders: the listing, what is said of it, files of all kinds, and the loader that decodes them."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch
import torchvision
from helpers import quick
from PIL import Image
from torchvision.transforms import v2

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.data import folder as listing
from kalmannorm.data.batches import derive_seed
from kalmannorm.data.folder import find_unreadable
from kalmannorm.data.pixels import Unreadable, read_rgb
from kalmannorm.data.stream import FolderLoader
from kalmannorm.errors import UserError
from kalmannorm.train import loaders

SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    folders.write(folder / "toy")
    return folder


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(root / "toy", tmp_path / "toy")
    return tmp_path / "toy"


def load(root: Path, **options: Any) -> data.Images:
    found = data.source(folders.config(**options), root)
    assert isinstance(found, data.Images)
    return found


# The listing ---------------------------------------------------------------------------------------------------------


def test_listing(root: Path) -> None:
    found = load(root)
    assert found.classes == 3 and len(found.train) == 36 and len(found.test) == 12
    assert found.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert found.train.path(0) == root / "toy" / "train" / "c0" / "0.jpg" and found.test.path(11).is_file()
    assert found.provenance["fidelity"] == "36 + 12 files, content not verified" and found.provenance["files"] == 48
    assert load(root / "toy").provenance == found.provenance  # the data root may be the folder itself


def test_the_hash_is_of_names_and_sizes(root: Path, own: Path) -> None:
    before = load(root).provenance["sha256"]
    assert load(own.parent).provenance["sha256"] == before
    (own / "train" / "c1" / "3.jpg").write_bytes(b"other")
    changed = load(own.parent).provenance["sha256"]
    (own / "train" / "c1" / "3.jpg").rename(own / "train" / "c1" / "003.jpg")
    assert len({before, changed, load(own.parent).provenance["sha256"]}) == 3


def test_published_numbers_are_compared(root: Path) -> None:
    assert "the published numbers" in load(root, published=[36, 12]).provenance["fidelity"]
    assert "not the published 1,281,167 + 50,000" in load(root, published=[1281167, 50000]).provenance["fidelity"]


def test_files_that_are_no_images_by_name_are_not_listed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "train" / "c0" / "notes.txt").write_text("hello")
    (own / "train" / "c2" / "x.gif").write_text("hello")
    (own / "train" / "README").write_text("hello")
    assert len(load(own.parent).train) == 36
    said = capsys.readouterr().err
    assert "left out 2 files" in said and "(.gif, .txt)" in said and "c0/notes.txt" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "name", [".hidden", ".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "lost+found", ".Trash-0"]
)
def test_what_is_hidden_is_no_class(root: Path, own: Path, name: str) -> None:
    (own / "train" / name).mkdir()
    shutil.copy(own / "train" / "c0" / "0.jpg", own / "train" / name / "0.jpg")
    shutil.copytree(own / "train" / name, own / "train" / "c1" / name)
    assert load(own.parent).provenance == load(root).provenance
    assert listing.count_classes(own.parent, folders.config()) == 3


@pytest.mark.parametrize("name", ["._0.jpg", ".0.jpg.swp", ".0.jpg", ".DS_Store"])
def test_what_is_hidden_is_no_image(root: Path, own: Path, name: str) -> None:
    (own / "train" / "c1" / name).write_bytes(b"\0\5\26\7 Mac OS X resource fork")
    (own / "val" / name).write_bytes(b"")
    assert load(own.parent).provenance == load(root).provenance


def test_links_are_followed(root: Path, own: Path) -> None:
    elsewhere = own.parent / "elsewhere"
    (own / "train" / "c1").rename(elsewhere)
    (own / "train" / "c1").symlink_to(elsewhere)
    (own / "val" / "c0" / "0.jpg").rename(own.parent / "picture.jpg")
    (own / "val" / "c0" / "0.jpg").symlink_to(own.parent / "picture.jpg")
    assert load(own.parent).provenance == load(root).provenance


@pytest.mark.parametrize(
    ("place", "target", "words"),
    [
        ("c0/loop", "../c0", "c0/loop links to a folder that holds it: remove the link"),
        ("c0/loop", "..", "c0/loop links to a folder that holds it"),
        ("c9", ".", "c9 links to a folder that holds it"),
        ("c9", "c9", "c9 is a link to nowhere"),
        ("c9", "unmounted/c9", "c9 is a link to nowhere"),
        ("c0/99.jpg", "unmounted/99.jpg", "c0/99.jpg: No such file or directory; repair or remove it"),
        ("c0/99.jpg", "99.jpg", "c0/99.jpg: Too many levels of symbolic links; repair or remove it"),
    ],
)
def test_links_that_lead_nowhere_are_named(own: Path, place: str, target: str, words: str) -> None:
    for split in ("train", "val"):
        (own / split / place).symlink_to(target)
    with pytest.raises(UserError, match=words):
        load(own.parent)


def test_torchvision_lists_the_same_in_the_same_order(own: Path) -> None:
    (own / "train" / "c1" / "b" / "a").mkdir(parents=True)
    for name in ("b/9.jpg", "b/a/0.JPEG", "b/Z.png", "10.jpg"):
        shutil.copy(own / "train" / "c1" / "0.jpg", own / "train" / "c1" / name)
    files = load(own.parent).train
    theirs = torchvision.datasets.ImageFolder(str(own / "train")).samples
    assert [(str(files.path(i)), int(files.labels[i])) for i in range(len(files))] == theirs


def spoil(own: Path, how: str) -> None:
    if how == "missing":
        shutil.rmtree(own)
    elif how == "no val":
        shutil.rmtree(own / "val")
    elif how == "other classes":
        (own / "val" / "c2").rename(own / "val" / "c9")
    elif how == "flat val":
        for file in list((own / "val").rglob("*.jpg")):
            file.rename(own / "val" / f"{file.parent.name}-{file.name}")
        for place in list((own / "val").iterdir()):
            if place.is_dir():
                place.rmdir()
    elif how == "empty class":
        for file in (own / "train" / "c1").iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["'toy' is not there", "train/ and val/", "DATA=", "dataset=digits"]),
        ("no val", ["has train/ but no val/", "ImageFolder"]),
        ("other classes", ["2 are not in both (c2, c9)"]),
        ("flat val", ["val has no class folders"]),
        ("empty class", ["c1 has no images", ".jpg"]),
    ],
)
def test_folders_that_cannot_be_used(own: Path, how: str, words: list[str]) -> None:
    spoil(own, how)
    with pytest.raises(UserError) as error:
        load(own.parent)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_missing_imagenet_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["dataset=imagenet", "arch=resnet14", "batch=g32_s4", "budget=smoke", "device=cpu", f"data={tmp_path}"]
    assert main(["train", *overrides, f"results={tmp_path}", f"runs={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "imagenet") in said and "image-net.org" in said and "dataset=digits" in said


# Files of all kinds --------------------------------------------------------------------------------------------------


def save(place: Path, mode: str) -> Path:
    """The same picture in another mode, true to the format."""
    rgb = Image.fromarray(folders.image(1))
    file = place / ("x.png" if mode in ("LA", "RGBA", "P", "I;16") else "x.jpg")
    if mode == "I;16":
        Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 256 + 17).save(file)
    elif mode == "LA":
        rgb.convert("L").convert("LA").save(file)
    else:
        rgb.convert(mode).save(file)
    return file


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "LA", "RGBA", "P", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = save(tmp_path, mode)
    with Image.open(file) as stored:
        assert stored.mode == mode
    found = read_rgb(file)
    assert found.mode == "RGB" and found.size == (32, 24)
    wanted = Image.fromarray(folders.image(1))
    grey = mode in ("L", "LA", "I;16")
    expected = np.asarray(wanted.convert("L").convert("RGB") if grey else wanted).astype(int)
    assert np.abs(np.asarray(found).astype(int) - expected).mean() < 20  # a palette and JPEG lose some
    if mode == "I;16":
        assert (np.asarray(found) == expected).all()


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"this is no image", "head": whole[:20]}
    file.write_bytes(content[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "head"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_unreadable_files_are_named(tmp_path: Path, mode: str, how: str) -> None:
    file = save(tmp_path, mode)
    damage(file, how)
    with pytest.raises(Unreadable) as error:
        read_rgb(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files_are_found_and_left_out(own: Path) -> None:
    damage(own / "train" / "c1" / "3.jpg", "truncated")
    damage(own / "val" / "c2" / "0.jpg", "empty")
    images = load(own.parent)
    found = find_unreadable(images, workers=2)
    assert [len(found[split]) for split in ("train", "val")] == [1, 1]
    left = images.without(found)
    assert len(left.train) == 35 and len(left.test) == 11
    said = left.provenance["unreadable"]
    assert said["count"] == 2 and said["left_out"][0].startswith("train/c1/3.jpg: ") and "val/c2" in said["left_out"][1]
    assert left.train.labels.tolist().count(1) == 11 and all(left.test.path(i).stat().st_size for i in range(11))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "7", '{"train": [], "val": []', "[" * 100_000]
    + [f'{{"train": {train}, "val": []}}' for train in ("5", "[5]", '[[99, ""]]', '[[-1, ""]]', '[["3", ""]]')],
)
def test_a_damaged_list_of_unreadable_files_is_made_anew(own: Path, tmp_path: Path, content: str) -> None:
    damage(own / "train" / "c1" / "3.jpg", "truncated")
    images = load(own.parent)
    file = tmp_path / "unreadable.json"
    found = find_unreadable(images, 1)
    file.write_text(json.dumps(found))
    assert loaders._kept(file, images) == found
    file.write_text(content)
    assert loaders._kept(file, images) is None


def test_all_unreadable_is_an_error(own: Path) -> None:
    for file in (own / "val").rglob("*.jpg"):
        damage(file, "text")
    images = load(own.parent)
    with pytest.raises(UserError, match="none of its 12 images can be read"):
        images.without(find_unreadable(images, 1))


def test_a_class_without_an_image_that_can_be_read_is_named(own: Path) -> None:
    for file in (own / "train" / "c1").rglob("*.jpg"):
        damage(file, "text")
    images = load(own.parent)
    with pytest.raises(UserError, match=r"train/c1 has no image that can be read, the last: train/c1/"):
        images.without(find_unreadable(images, 1))


def test_one_folder_for_both_is_said(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(own / "val")
    (own / "val").symlink_to("train")
    load(own.parent)
    assert "train/ and val/ are one folder" in capsys.readouterr().err


# The loader ----------------------------------------------------------------------------------------------------------


def loader(root: Path, split: str = "train", **options: Any) -> FolderLoader:
    dataset = folders.config()
    common = {key: dataset[key] for key in ("flip", "mean", "std")}
    files = getattr(load(root), split)
    return FolderLoader(files, **{"size": SIZE, "batch": 8, "device": "cpu", "seed": 3, **common, **options})


def together(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_an_epoch_is_drawn_as_documented(root: Path) -> None:
    images, labels = together(loader(root).epoch(5))
    assert images.shape == (32, 3, SIZE, SIZE) and images.dtype == torch.float32 and images.is_contiguous()
    generator = torch.Generator().manual_seed(derive_seed(3, 5))
    order = torch.randperm(36, generator=generator)
    keys = torch.randint(2**32, (36,), generator=generator)
    files = load(root).train
    crop = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    mean, std = (torch.tensor(folders.config()[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    for at in (0, 7, 31):
        torch.manual_seed(int(keys[at]))
        expected = (crop(read_rgb(files.path(int(order[at])))) - mean) / std
        assert torch.allclose(images[at], expected, atol=1e-5) and labels[at] == files.labels[order[at]]


def test_an_epoch_depends_on_seed_and_epoch_alone(root: Path) -> None:
    """Not on the workers, nor on what the global generator did, which is left alone."""
    source = loader(root)
    first = together(source.epoch(1))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with_workers = loader(root, workers=2)
    assert same(together(with_workers.epoch(1)), first)
    assert same(together(with_workers.epoch(1)), first)  # the workers live on
    assert same(together(source.epoch(1)), first)
    list(source.unaugmented(8))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(together(source.epoch(2))[0], first[0])
    assert not torch.equal(together(loader(root, seed=4).epoch(1))[0], first[0])


def test_going_on_in_mid_epoch_decodes_nothing_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = together(loader(root).epoch(2))
    read = []
    monkeypatch.setattr("kalmannorm.data.stream.read_rgb", lambda path: (read.append(path), read_rgb(path))[1])
    rest = together(loader(root).epoch(2, 3))
    assert same(rest, (images[24:], labels[24:])) and len(read) == 8
    assert list(loader(root).epoch(2, 4)) == []


def test_leaving_an_epoch_leaves_nothing_for_the_next(root: Path) -> None:
    source = loader(root, workers=1, batch=2)
    expected = together(loader(root, batch=2).epoch(1))
    next(source.epoch(0))
    assert same(together(source.epoch(1)), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_shards_together_are_one(root: Path, world: int) -> None:
    ranks = [list(loader(root, shard=(rank, world)).epoch(1)) for rank in range(world)]
    for step, (images, labels) in enumerate(loader(root).epoch(1)):
        for rank in range(world):
            assert same(ranks[rank][step], (images[rank::world], labels[rank::world]))


@pytest.mark.parametrize(("batch", "fill", "last"), [(8, 4, 4), (5, 5, 5), (12, 6, 12), (7, 1, 5)])
def test_evaluation_counts_each_image_once(root: Path, batch: int, fill: int, last: int) -> None:
    batches = list(loader(root, "test").unaugmented(batch, fill=fill))
    assert sum(counted for _, _, counted in batches) == 12 and len(batches[-1][0]) == last
    means = torch.cat([images[:counted] for images, _, counted in batches]).flatten(1).mean(1)
    assert len(means.unique()) == 12
    again = list(loader(root, "test", seed=9, workers=1).unaugmented(batch, fill=fill))
    assert all(same(a[:2], b[:2]) and a[2] == b[2] for a, b in zip(batches, again, strict=True))


def test_evaluation_sees_the_centre(root: Path) -> None:
    """The shorter side becomes size x 256 / 224, then the centre is cut out."""
    images, _, _ = next(loader(root, "test").unaugmented(1, [3]))
    centre = v2.Compose([v2.Resize(round(SIZE * 256 / 224)), v2.CenterCrop(SIZE), v2.PILToTensor()])
    mean, std = (torch.tensor(folders.config()[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    assert torch.allclose(images[0], (centre(read_rgb(load(root).test.path(3))) - mean) / std, atol=1e-5)


def test_flip_off(root: Path) -> None:
    (flipped, _), (plain, _) = together(loader(root).epoch(0)), together(loader(root, flip=False).epoch(0))
    equal = (flipped == plain).flatten(1).all(1)
    assert 0 < int(equal.sum()) < 32
    assert torch.equal(flipped[~equal].flip(-1), plain[~equal])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_ends_the_run_with_its_name(own: Path, workers: int) -> None:
    file = own / "train" / "c1" / "3.jpg"
    damage(file, "truncated")
    with pytest.raises(UserError, match=r"c1/3\.jpg.*dataset\.unreadable=skip") as error:
        together(loader(own.parent, workers=workers, batch=36).epoch(0))
    assert "\n" not in str(error.value)


def test_a_subset_is_of_the_files(root: Path) -> None:
    files = load(root).train
    chosen = data.class_balanced_subset(files.labels, 7)
    part = files.take(chosen)
    assert len(part) == 7 and part.path(6) == files.path(chosen[6])


def test_names_that_are_not_ascii(own: Path) -> None:
    shutil.copy(own / "train" / "c0" / "0.jpg", own / "train" / "c0" / "größe ü.jpg")
    files = load(own.parent).train
    assert [files.path(i).name for i in range(13)][-1] == "größe ü.jpg" and read_rgb(files.path(12)).mode == "RGB"


def test_names_that_are_not_utf8(own: Path) -> None:
    raw = os.fsencode(own / "train" / "c0") + b"/gr\xf6sse.jpg"
    Path(os.fsdecode(raw)).write_bytes((own / "train" / "c0" / "0.jpg").read_bytes())
    files = load(own.parent).train
    assert os.fsencode(files.path(12)) == raw and read_rgb(files.path(12)).mode == "RGB"
    Path(os.fsdecode(raw)).write_bytes(b"")
    found = find_unreadable(load(own.parent), 1)
    assert [index for index, _ in found["train"]] == [12]


PLANTED = {  # under the name of an image
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\nshowpage\n",
    "script": b"#!/bin/sh\ntouch ran\n",
    "pickle": b"cposix\nsystem\n(S'touch ran'\ntR.",
    "page": b"<svg xmlns='http://www.w3.org/2000/svg'><script>touch ran</script></svg>",
    "fork": b"\0\5\26\7\0\2\0\0Mac OS X",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", quick(PLANTED, "postscript", "pickle"))
def test_a_planted_file_ends_the_command_in_one_line_and_runs_nothing(
    own: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    for program in ("gs", "sh", "touch"):
        (own / program).write_text("#!/bin/bash\necho > ran\n")
        (own / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")
    monkeypatch.chdir(own)
    for file in (own / "train" / "c1").iterdir():
        file.write_bytes(PLANTED[kind])
    overrides = ["dataset=image_folder", "dataset.name=toy", "arch=resnet14", "batch=g32_s4", "budget=smoke"]
    overrides += ["budget.subset=null", "device=cpu", "workers=1", f"data={own}", f"results={own}/r", f"runs={own}/u"]
    assert main(["train", *overrides]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("\n") == 1 and "c1/" in said and "dataset.unreadable=skip" in said
    assert not (own / "ran").exists() and not list(own.glob("r/records/*"))


def test_classes_are_counted(root: Path) -> None:
    assert listing.count_classes(root, folders.config()) == 3


def test_workers_may_open_their_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many wait for each: what the system allows beyond what a process has at first is taken, too little is named."""
    allowed = [80, 100]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(allowed))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: allowed.__setitem__(slice(None), limits))
    loader(root, workers=2)
    assert allowed == [80, 100]
    loader(root, workers=3)
    assert allowed == [92, 100]
    with pytest.raises(UserError, match=r"4 processes .* need 112 open files, and 100 are allowed: .* workers="):
        loader(root, workers=4)
