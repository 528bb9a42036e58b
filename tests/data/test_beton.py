"""FFCV's files: what is refused without them, a writer that fails or hangs, and, where FFCV is installed, all of it.

`make setup-ffcv` installs it; the tests of the first part have a stand-in for its writer.
"""

import importlib.util
import json
import os
import signal
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch
from folders import SMALL
from trainings import only_record, place

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.data import beton_write
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    folders.write(folder / "toy")
    return folder


# Refusals ------------------------------------------------------------------------------------------------------------


def test_without_ffcv_the_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmannorm.data.beton.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"make setup-ffcv.*dataset\.loader=torchvision"):
        data.source(folders.config(loader="ffcv"), root)
    with pytest.raises(UserError, match="make setup-ffcv"):
        beton_write.write(folders.config(), root)


def described(folder: Path, size: int) -> None:
    source = {"classes": 3, "bytes": {"train": size, "val": size}, "written": {}, "provenance": {"name": "toy"}}
    (folder / "beton.json").write_text(json.dumps(source))


def test_missing_and_damaged_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmannorm.data.beton.require_ffcv", lambda: None)
    with pytest.raises(UserError, match=r"looked for beton\.json in .*kalmannorm data ffcv toy"):
        data.source(folders.config(loader="ffcv"), root)
    described(tmp_path, 7)
    (tmp_path / "train.beton").write_bytes(b"123")
    with pytest.raises(UserError, match="has 3 bytes, expected 7"):
        data.source(folders.config(loader="ffcv"), tmp_path)
    with pytest.raises(UserError, match="files of 'toy', not of 'flowers'"):
        data.source(folders.config("flowers", loader="ffcv"), tmp_path)
    (tmp_path / "beton.json").write_text("{}")
    with pytest.raises(UserError, match="not usable"):
        data.source(folders.config(loader="ffcv"), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["cifar10"], ["cifar10", "fits into memory"]),
        (["imagenett"], ["imagenett", "imagenet"]),
        (["tiny_imagenet_20", "--mode", "png"], ["--mode png", "jpg or raw"]),
        (["tiny_imagenet_20", "--quality", "0"], ["--quality 0"]),
        (["tiny_imagenet_20", "--max-resolution", "5000"], ["--max-resolution 5000", "1600"]),
    ],
)
def test_wrong_options_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], words: Any
) -> None:
    monkeypatch.setattr(beton_write, "require_ffcv", lambda: None)
    assert main(["data", "ffcv", *options, "--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


# A writer that fails -------------------------------------------------------------------------------------------------

STAND_IN = """
import os, time
from multiprocessing import Process
from pathlib import Path

def job(dataset, first, count, mode):
    for i in range(first, first + count):
        dataset[i]
        if i == 5 and mode == "dies":
            os._exit(3)
        if i == 5 and mode == "hangs":
            time.sleep(1000)

class DatasetWriter:
    def __init__(self, file, fields, num_workers):
        self.file, self.mode, self.workers = Path(file), os.environ["STAND_IN"], num_workers
    def from_indexed_dataset(self, dataset, chunksize):
        share = len(dataset) // self.workers
        processes = [Process(target=job, args=(dataset, i * share, share, self.mode))
                     for i in range(self.workers)]
        for process in processes:
            process.start()
        pids = Path(os.environ["PIDS"])
        pids.write_text(" ".join(str(process.pid) for process in processes))
        while any(process.exitcode != 0 for process in processes):  # as FFCV's: forever, where one has failed
            time.sleep(0.01)
        self.file.write_bytes(b"beton")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another package `ffcv` for the writer's process."""
    package = tmp_path / "stand-in" / "ffcv"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "fields.py").write_text("def IntField(): pass\ndef RGBImageField(**options): pass\n")
    (package / "writer.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.setattr(beton_write, "require_ffcv", lambda: None)
    monkeypatch.setattr(beton_write, "version", lambda name: "stand-in")
    return tmp_path / "out"


def assert_nothing_is_left(out: Path) -> None:
    assert not out.exists() and not list(out.parent.glob(".out*"))
    for pid in (out.parent / "pids").read_text().split():
        for _ in range(50):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            os.kill(int(pid), signal.SIGKILL)
            pytest.fail(f"worker {pid} is still there")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("dies", "a worker of FFCV's writer died"),
        ("hangs", "did nothing for 3 s after 2. of 36 images"),
    ],
)
def test_a_writer_that_fails_is_ended(
    root: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    monkeypatch.setenv("STAND_IN", mode)
    with pytest.raises(UserError, match=words):
        beton_write.write(folders.config(), root, stand_in, workers=2, timeout=3 if mode == "hangs" else 60)
    assert_nothing_is_left(stand_in)


def test_an_unreadable_image_ends_the_writer_or_is_left_out(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "well")
    root = folders.write(tmp_path / "data" / "toy").parent
    (root / "toy" / "train" / "c1" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c1/3\.jpg.*--skip-unreadable"):
        beton_write.write(folders.config(), root, stand_in, workers=1)
    assert_nothing_is_left(stand_in)
    assert beton_write.write(folders.config(), root, stand_in, workers=1, skip=True) == stand_in
    source = json.loads((stand_in / "beton.json").read_text())
    assert source["provenance"]["unreadable"]["count"] == 1 and source["bytes"]["train"] == 5
    assert sorted(file.name for file in stand_in.iterdir()) == ["beton.json", "train.beton", "val.beton"]


# FFCV itself ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def betons(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("betons")
    form = beton_write.Form(mode="raw")
    return beton_write.write(folders.config(), root, out, form=form, workers=2)


def loader(betons: Path, split: str = "train", **options: Any) -> Any:
    from kalmannorm.data.beton_loader import BetonLoader

    found = data.source(folders.config(loader="ffcv"), betons)
    assert isinstance(found, data.Betons)
    common = {key: folders.config()[key] for key in ("flip", "mean", "std")}
    part = getattr(found, split)
    return BetonLoader(part, **{"size": 16, "batch": 8, "device": "cpu", "seed": 3, **common, **options})


def same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for x, y in zip(some, others, strict=True)
                                            for a, b in zip(x[:2], y[:2], strict=True))  # fmt: skip


@needs_ffcv
def test_the_record_says_how_it_was_written(root: Path, betons: Path) -> None:
    found = data.source(folders.config(loader="ffcv"), betons)
    assert found.classes == 3 and found.provenance["beton"]["mode"] == "raw"
    assert found.provenance["sha256"] == data.source(folders.config(), root).provenance["sha256"]
    assert "FFCV" in found.provenance["loader"] and "ignore the seed" in found.provenance["loader"]


@needs_ffcv
def test_ffcv_repeats_resumes_and_shards(betons: Path) -> None:
    """Twice the same, from the middle, on two processes; on two threads as on one; torch's threads left alone."""
    torch.manual_seed(0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    source = loader(betons)
    whole = list(source.epoch(2))
    assert len(whole) == 4 and whole[0][0].shape == (8, 3, 16, 16)
    np.random.seed(5)  # noqa: NPY002
    assert same(list(source.epoch(2)), whole) and same(list(source.epoch(2, 3)), whole[3:])
    assert not same(list(source.epoch(1)), whole)
    assert same(list(loader(betons, workers=2).epoch(2)), whole)
    left, alive = source.epoch(0), threading.active_count()
    next(left)
    del left
    assert same(list(source.epoch(2)), whole) and threading.active_count() == alive
    for rank in range(2):
        part = list(loader(betons, shard=(rank, 2)).epoch(2))
        assert same(part, [(images[rank::2], labels[rank::2]) for images, labels in whole])
    assert torch.get_num_threads() == threads and torch.equal(before, torch.get_rng_state())


@needs_ffcv
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_decoding_thread_that_dies_is_no_hang(betons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr("ffcv.loader.epoch_iterator.EpochIterator.run_pipeline", fail)
    with pytest.raises(RuntimeError, match="decoding thread has died"):
        next(loader(betons).epoch(0))


@needs_ffcv
def test_ffcv_evaluates_every_image_once(betons: Path, root: Path) -> None:
    from kalmannorm.data.stream import FolderLoader

    batches = list(loader(betons, "test").unaugmented(8, fill=8))
    assert [(len(images), counted) for images, _, counted in batches] == [(8, 8), (8, 4)]
    files = data.source(folders.config(), root)
    assert isinstance(files, data.Images)
    common = {key: folders.config()[key] for key in ("flip", "mean", "std")}
    other = FolderLoader(files.test, size=16, batch=8, device="cpu", seed=3, **common)
    for (ours, labels, _), (theirs, same_labels, _) in zip(batches, other.unaugmented(8, fill=8), strict=True):
        assert torch.equal(labels, same_labels)
        assert (ours - theirs).abs().mean() < 0.2  # of a standard deviation: another way to make images smaller


@needs_ffcv
def test_crops_are_as_torchvision_draws_them() -> None:
    """Areas uniform from 8 % on, aspects within their range, flips for every other key."""
    from kalmannorm.data.beton_decode import random_box, uniform
    from kalmannorm.data.stream import RATIO, SCALE

    keys = np.random.default_rng(0).integers(0, 2**32, 4000)
    boxes = np.array([random_box(400, 400, np.uint64(key), SCALE, RATIO) for key in keys])
    row, column, height, width = boxes.T
    assert (row >= 0).all() and (row + height <= 400).all() and (column >= 0).all() and (column + width <= 400).all()
    aspect, area = width / height, width * height / 400**2
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and abs(np.log(aspect).mean()) < 0.01
    small = area[area < 0.7]  # larger ones are drawn again where their aspect does not fit
    assert abs(np.median(small) - 0.39) < 0.02 and area.min() < 0.1
    draws = np.array([uniform(np.uint64(key), 40) for key in keys])
    assert abs(draws.mean() - 0.5) < 0.02 and abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(draws, area)[0, 1]) < 0.05
    assert random_box(100, 1000, np.uint64(1), (5.0, 6.0), RATIO) == (0, 433, 100, 133)  # none fits: the centre


@needs_ffcv
def test_a_run_on_betons(betons: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "dataset.loader=ffcv", "dataset.classes=3", f"data={betons}"]
    assert compose(overrides).dataset.loader == "ffcv"
    assert main(["train", *overrides, *place(tmp_path)]) == 0
    record = only_record(tmp_path)
    assert record["data"]["beton"]["max_resolution"] == 500 and record["final"]["precise"]["images"] == 12
