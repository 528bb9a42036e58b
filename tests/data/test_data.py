"""Data sets: sources, folder layout, resizing, subsets, and what is refused with which words."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_files import Touch, folder_of, images_of

from kalmannorm import data
from kalmannorm.data import arrays as arrays_module
from kalmannorm.errors import UserError, nearest

# Names, root, errors -------------------------------------------------------------------------------------------------


def test_nearest_names_the_closest_and_all_valid() -> None:
    expected = "unknown dataset 'cifar11'; did you mean 'cifar10'? valid: digits, cifar10"
    assert nearest("cifar11", ["digits", "cifar10"], "dataset") == expected
    assert nearest("CIFAR10", ["digits", "cifar10"]).startswith("unknown name 'CIFAR10'; did you mean 'cifar10'?")
    assert nearest("zzz", ["digits"], "arch") == "unknown arch 'zzz'; valid: digits"


@pytest.mark.parametrize("call", [data.load, data.prepare])
def test_unknown_dataset(call: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'cifar11'; did you mean 'cifar10'"):
        call("cifar11", tmp_path)


def test_root_is_option_then_environment_then_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALMANNORM_DATA", "/from/environment")
    assert data.root("/from/option") == Path("/from/option")
    assert data.root(None) == Path("/from/environment")
    monkeypatch.setenv("KALMANNORM_DATA", "")
    assert data.root() == Path("data")
    monkeypatch.delenv("KALMANNORM_DATA")
    assert data.root() == Path("data")
    assert data.root("~/sets") == Path.home() / "sets"


def test_names_are_known_without_torch() -> None:
    code = "import sys, kalmannorm.errors, kalmannorm.data; assert not {'torch', 'sklearn', 'scipy'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


# Digits --------------------------------------------------------------------------------------------------------------


def test_digits(tmp_path: Path) -> None:
    digits = data.load("digits", tmp_path)
    assert digits.train_images.shape == (1437, 8, 8, 3) and digits.test_images.shape == (360, 8, 8, 3)
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int64 and digits.classes == 10
    assert digits.train_images.max() == 255 and digits.train_images.min() == 0
    assert (digits.train_images == digits.train_images[..., :1]).all()
    counts = np.bincount(digits.test_labels)
    assert counts.min() >= 34 and counts.max() <= 37  # stratified: 1,797 images have 174 to 183 of each digit
    # The split is part of every result on digits: a change of it must show.
    assert digits.provenance == {
        "name": "digits",
        "fidelity": "scikit-learn's bundled copy",
        "sha256": "30937357f2f9d82f36d5db43a214cd2ae5e1d99f5909b82315547be2f09ce23c",
    }


def test_digits_need_no_preparing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to prepare"):
        data.prepare("digits", tmp_path)


# The folder layout ---------------------------------------------------------------------------------------------------


def test_folder_is_accepted_and_its_provenance_carried(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    loaded = data.load("cifar10", tmp_path)
    four = [np.load(folder / f"{name}.npy") for name in arrays_module.ARRAYS]
    for got, want in zip(
        (loaded.train_images, loaded.train_labels, loaded.test_images, loaded.test_labels), four, strict=True
    ):
        assert got.dtype == want.dtype and np.array_equal(got, want)
    assert loaded.classes == 10
    assert loaded.provenance["name"] == "cifar10"
    assert loaded.provenance["sha256"] == hashlib.sha256(b"".join(array.tobytes() for array in four)).hexdigest()
    size = "; 24 + 12 images, not the published 50,000 + 10,000"
    assert loaded.provenance["fidelity"] == "unknown (no source.json)" + size
    source = {"dataset": "cifar10", "exact_images": {"train": 20, "test": 11}, "packs": {}}  # as unpack.py writes it
    (folder / "source.json").write_text(json.dumps(source))
    assert data.load("cifar10", tmp_path).provenance["fidelity"] == "31 of 36 exact" + size
    (folder / "source.json").write_text("{}")
    assert data.load("cifar10", tmp_path).provenance["fidelity"].startswith("unknown (source.json does not say)")
    (folder / "source.json").write_text(json.dumps({"fidelity": "a\nline"}))
    assert data.load("cifar10", tmp_path).provenance["fidelity"].startswith("a line;")


def test_published_sizes_are_not_remarked_upon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    (folder / "source.json").write_text(json.dumps({"dataset": "cifar10", "exact_images": {"train": 24, "test": 12}}))
    monkeypatch.setitem(data.OFFICIAL, "cifar10", replace(data.OFFICIAL["cifar10"], counts=(24, 12)))
    assert data.load("cifar10", tmp_path).provenance["fidelity"] == "36 of 36 exact"


def test_cifar100_has_a_hundred_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, "cifar100", test_labels=np.array([99] * 12))
    assert data.load("cifar100", tmp_path).classes == 100


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "svhn_extra"])
def test_missing_says_what_where_how_and_what_runs_without(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"'{name}'",
        str(tmp_path / name),
        f"make data-{name} DATA={tmp_path}",
        f"kalmannorm data prepare {name} --root {tmp_path}",
        "dataset=digits",
    ):
        assert part in message


def test_one_missing_file_is_named(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "test_labels.npy").unlink()
    with pytest.raises(UserError, match=r"missing test_labels\.npy;"):
        data.load("cifar10", tmp_path)


LABELS = np.zeros(24, np.int64)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        (
            {"train_images": images_of(24, 16)},
            r"train_images\.npy has shape \[24, 16, 16, 3\], expected \[N, 32, 32, 3\]",
        ),
        ({"train_images": np.zeros((24, 3072), np.uint8)}, r"shape \[24, 3072\]"),
        ({"train_images": np.zeros((24, 32, 32, 3), np.float32)}, "dtype float32, expected uint8"),
        ({"test_labels": np.zeros(12, np.uint8)}, r"test_labels\.npy has dtype uint8, expected int64"),
        ({"train_labels": LABELS[:, None]}, r"shape \[24, 1\], expected \[N\]"),
        ({"train_labels": LABELS[:23]}, "23 labels for 24 images"),
        ({"train_labels": LABELS + 10}, "labels from 10 to 10, expected 0 to 9"),
        ({"train_labels": LABELS - 1}, "labels from -1 to -1, expected 0 to 9"),
        ({"test_images": images_of(0), "test_labels": LABELS[:0]}, "no entries"),
        ({"train_labels": np.array([{}] * 24, dtype=object)}, r"cannot read .*train_labels\.npy"),
    ],
)
def test_wrong_arrays_are_refused(replaced: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    folder_of(tmp_path, **replaced)
    with pytest.raises(UserError, match=words):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 60, 5000])
def test_truncated_arrays_are_refused(keep: int, tmp_path: Path) -> None:
    path = folder_of(tmp_path) / "train_images.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cannot read .*train_images\.npy: .*prepare the data set again"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("shape", [(10**15, 32, 32, 3), (10**6, 32, 32, 3), (2**62, 4, 1, 1), (-1, 32, 32, 3)])
def test_arrays_that_claim_more_than_they_have_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Before anything is allocated: 3 GB in the second case."""
    folder = folder_of(tmp_path)
    header = str({"descr": "|u1", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    (folder / "train_images.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header.encode() + b"\0" * 3072)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"cannot read .*train_images\.npy.*prepare the data set again"):
        data.load("cifar10", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_pickles_and_archives_in_place_of_arrays_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "test_labels.npy").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(UserError, match="cannot read"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "touched").exists()
    with (folder / "test_labels.npy").open("wb") as file:
        np.savez(file, labels=np.zeros(12, np.int64))
    with pytest.raises(UserError, match="expected one array"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "holds a list"),
        ('{"dataset": "cifar100"}', "says dataset 'cifar100', expected 'cifar10'"),
        ('{"exact_images": {"train": 25, "test": 1}}', "exact_images"),
        ('{"exact_images": 36}', "exact_images"),
        ('{"sha256": "0"}', "changed or damaged"),
    ],
)
def test_wrong_source_is_refused(source: str, words: str, tmp_path: Path) -> None:
    (folder_of(tmp_path) / "source.json").write_text(source)
    with pytest.raises(UserError, match=words):
        data.load("cifar10", tmp_path)


# Resizing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "factor"), [(16, 2), (8, 4), (1, 32)])
def test_shrinking_is_the_mean_of_each_block(size: int, factor: int) -> None:
    images = images_of(7)
    small = data.resize(images, size)
    blocks = images.reshape(7, size, factor, size, factor, 3).astype(np.float64).mean(axis=(2, 4))
    assert small.shape == (7, size, size, 3) and small.dtype == np.uint8
    assert np.array_equal(small, np.floor(blocks + 0.5))


@pytest.mark.parametrize(("start", "size"), [(8, 16), (8, 32), (8, 20), (32, 33), (1, 4)])
def test_enlarging_is_bilinear_as_torch_does_it(start: int, size: int) -> None:
    images = images_of(5, start)
    large = data.resize(images, size)
    assert large.shape == (5, size, size, 3) and large.dtype == np.uint8
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.interpolate(nchw, size=(size, size), mode="bilinear", align_corners=False)
    assert np.abs(large - exact.permute(0, 2, 3, 1).numpy()).max() <= 0.5001


def test_resizing_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(23)
    whole = [data.resize(images, size) for size in (16, 40)]
    monkeypatch.setattr(arrays_module, "CHUNK", 5)
    for want, size in zip(whole, (16, 40), strict=True):
        assert np.array_equal(data.resize(images, size), want)
    assert data.resize(images, 32) is images


@pytest.mark.parametrize("size", [0, -1, 12, 31])
def test_sizes_that_do_not_fit(size: int) -> None:
    with pytest.raises(UserError, match=f"size {size} does not fit 32 x 32"):
        data.resize(images_of(1), size)


# Subsets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 37, 100, 333])
def test_subset_is_balanced_and_repeatable(count: int) -> None:
    labels = np.sort(np.random.RandomState(1).randint(0, 10, 1000)).astype(np.int64)
    chosen = data.class_balanced_subset(labels, count)
    assert len(chosen) == count == len(np.unique(chosen)) and chosen.dtype == np.int64
    sizes = np.bincount(labels[chosen], minlength=10)
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(chosen, data.class_balanced_subset(labels, count))
    if count > 10:
        assert not np.array_equal(chosen, data.class_balanced_subset(labels, count, seed=1))


def test_subset_draw_is_fixed() -> None:
    labels = np.arange(30, dtype=np.int64) % 3
    assert data.class_balanced_subset(labels, 7).tolist() == [6, 8, 10, 11, 16, 24, 26]


def test_subset_of_all_and_too_many() -> None:
    labels = np.arange(30, dtype=np.int64) % 3
    assert np.array_equal(data.class_balanced_subset(labels, 30), np.arange(30))
    for count in (31, 2, 0):
        with pytest.raises(UserError, match=f"a subset of {count} images of 30"):
            data.class_balanced_subset(labels, count)
    with pytest.raises(UserError, match="needs 10 of class 1, there are 4: take at most 8"):
        data.class_balanced_subset(np.array([0] * 20 + [1] * 4), 20)
