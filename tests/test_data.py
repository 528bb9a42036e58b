"""Data sets: sources, folder layout, official archives, resizing, subsets, and what is refused with which words.

Archives are written here in the true formats, small, with the md5 constants replaced.
"""

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets

from kalmannorm import data
from kalmannorm.data import arrays as arrays_module
from kalmannorm.data import cifar, svhn
from kalmannorm.errors import UserError, nearest

RANDOM = np.random.RandomState(0)


def images_of(count: int, size: int = 32) -> np.ndarray:
    return RANDOM.randint(0, 256, (count, size, size, 3)).astype(np.uint8)


def folder_of(root: Path, name: str = "cifar10", train: int = 24, test: int = 12, **replaced: np.ndarray) -> Path:
    """A small set in the layout, with chosen arrays replaced."""
    folder = root / name
    folder.mkdir(parents=True)
    four = {
        "train_images": images_of(train),
        "train_labels": np.arange(train, dtype=np.int64) % 10,
        "test_images": images_of(test),
        "test_labels": np.arange(test, dtype=np.int64) % 10,
        **replaced,
    }
    for key, array in four.items():
        np.save(folder / f"{key}.npy", array)
    return folder


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
    monkeypatch.setattr(cifar, "OFFICIAL", (24, 12))
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


# Official CIFAR archives ---------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the pure-Python one, to write Python 2's strings
    """Protocol 2 as Python 2 wrote the official batches: every text is a byte string."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, obj: str | bytes) -> None:
        raw = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class Touch:
    """Unpickled by pickle.load, it makes a file: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return os.mkdir, (str(self.path),)  # type: ignore[return-value]


def cifar_members(name: str = "cifar10") -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """The files of a small archive, and the four arrays that should come out."""
    official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    members, parts = {f"{official.base_folder}/readme.html": b"<html>"}, {"train": [], "test": []}
    for split, files in (("train", official.train_list), ("test", official.test_list)):
        for file, _ in files:
            images, labels = images_of(4), RANDOM.randint(0, classes, 4)
            entry = {
                "batch_label": file,
                key: labels.tolist(),
                "data": images.transpose(0, 3, 1, 2).reshape(4, 3072).copy(),
                "filenames": ["a.png"] * 4,
            }
            if name == "cifar100":
                entry["coarse_labels"] = [0] * 4
            members[f"{official.base_folder}/{file}"] = python2_pickle(entry)
            parts[split].append((images, labels))
    arrays = {}
    for split, batches in parts.items():
        arrays[f"{split}_images"] = np.concatenate([images for images, _ in batches])
        arrays[f"{split}_labels"] = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    return members, arrays


def write_archive(
    path: Path, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str = "cifar10"
) -> Path:
    """A .tar.gz whose md5 is the one torchvision expects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            if content.startswith(b"-> "):
                info.type, info.linkname, content = tarfile.SYMTYPE, content[3:].decode(), b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    monkeypatch.setattr(official, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def assert_prepared(root: Path, name: str, arrays: dict[str, np.ndarray], words: str) -> None:
    loaded = data.load(name, root)
    for key, want in arrays.items():
        got = getattr(loaded, key)
        assert got.dtype == want.dtype and np.array_equal(got, want), key
    assert loaded.provenance["fidelity"].startswith(words)
    assert not list(root.glob(".*"))  # nothing half-written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["root", "folder", "option"])
def test_prepare_cifar(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, arrays = cifar_members(name)
    root = tmp_path / "sets"
    folder = {"root": root, "folder": root / name, "option": tmp_path / "elsewhere"}[place]
    archive = write_archive(folder / f"{name[:5]}-{name[5:]}-python.tar.gz", members, monkeypatch, name)
    out = data.prepare(name, root, archive if place == "option" else None, download=False)
    assert out == root / name and archive.exists()
    assert_prepared(root, name, arrays, "official archive, md5 verified")
    source = json.loads((out / "source.json").read_text())
    assert source["dataset"] == name and source["archive_md5"] == hashlib.md5(archive.read_bytes()).hexdigest()
    assert source["exact_images"] == {"train": len(arrays["train_labels"]), "test": len(arrays["test_labels"])}


def test_prepare_keeps_what_is_complete(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert data.prepare("cifar10", tmp_path, tmp_path / "no.tar.gz", download=False) == folder
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    np.save(folder / "train_labels.npy", np.zeros(3, np.int64))
    with pytest.raises(UserError, match="3 labels for 24 images"):
        data.prepare("cifar10", tmp_path)


def test_prepare_replaces_an_incomplete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    (folder / "train_images.npy").unlink()
    (folder / "source.json").write_text('{"sha256": "of something else"}')
    stale = tmp_path / f".cifar10.{os.getpid()}.partial"  # of a killed process that had our number
    stale.mkdir()
    members, arrays = cifar_members()
    write_archive(folder / "cifar-10-python.tar.gz", members, monkeypatch)
    data.prepare("cifar10", tmp_path, download=False)
    assert_prepared(tmp_path, "cifar10", arrays, "official archive, md5 verified")


def test_prepared_arrays_that_changed_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_members()[0], monkeypatch)
    folder = data.prepare("cifar10", tmp_path, download=False)
    labels = np.load(folder / "train_labels.npy")
    np.save(folder / "train_labels.npy", labels[::-1])
    with pytest.raises(UserError, match="changed or damaged since they were prepared"):
        data.load("cifar10", tmp_path)


def test_wrong_md5_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official = "cifar-10-batches-py/data_batch_1"
    archive = write_archive(
        tmp_path / "cifar-10-python.tar.gz", {official: pickle.dumps(Touch(tmp_path / "touched"))}, monkeypatch
    )
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "c58f30108f718f92721af3b95e74349a")
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("opened before its md5 was right"))
    with pytest.raises(UserError, match=r"has md5 .*, expected c58f30108f718f92721af3b95e74349a"):
        data.prepare("cifar10", tmp_path, archive)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "cifar-10-batches-py/../../escaped"])
def test_paths_that_lead_outside_are_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, _ = cifar_members()
    write_archive(tmp_path / "cifar-10-python.tar.gz", {**members, path: b"here"}, monkeypatch)
    with pytest.raises(UserError, match=r"leads outside or is no plain file: refused"):
        data.prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists() and not list(tmp_path.parent.glob("escaped"))


def test_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, _ = cifar_members()
    members["cifar-10-batches-py/test_batch"] = b"-> /etc/passwd"
    write_archive(tmp_path / "cifar-10-python.tar.gz", members, monkeypatch)
    with pytest.raises(UserError, match=r"test_batch.*refused"):
        data.prepare("cifar10", tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_run_code_are_refused(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, _ = cifar_members()
    entry = {"data": Touch(tmp_path / "touched"), "labels": [0]}
    members["cifar-10-batches-py/data_batch_2"] = pickle.dumps(entry, protocol)
    write_archive(tmp_path / "cifar-10-python.tar.gz", members, monkeypatch)
    with pytest.raises(UserError, match=r"data_batch_2: its pickle asks for \w+\.mkdir, only numpy arrays"):
        data.prepare("cifar10", tmp_path)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("asked", ["numpy.load", "numpy.fromfile", "numpy.core.multiarray.fromstring", "builtins.eval"])
def test_unpickler_knows_three_names_only(asked: str) -> None:
    module, name = asked.rsplit(".", 1)
    with pytest.raises(UserError, match="refused"):
        cifar.ArrayUnpickler(io.BytesIO(f"c{module}\n{name}\n.".encode())).load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not hold cifar-10-batches-py/test_batch"),
        (b"\x80\x02}", "cannot read cifar-10-batches-py/test_batch"),
        (python2_pickle({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}), "data float32"),
        (python2_pickle({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}), r"data uint8 \[2, 3071\]"),
        (python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "for 1 labels"),
        (python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "out of 0 to 9"),
        (python2_pickle({"data": np.zeros((2, 3072), np.uint8)}), "cannot read"),
        (python2_pickle([1, 2]), "cannot read"),
    ],
)
def test_unexpected_batches_are_refused(
    content: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, _ = cifar_members()
    del members["cifar-10-batches-py/test_batch"]
    if content is not None:
        members["cifar-10-batches-py/test_batch"] = content
    write_archive(tmp_path / "cifar-10-python.tar.gz", members, monkeypatch)
    with pytest.raises(UserError, match=words):
        data.prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_archive_that_is_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_members()[0], monkeypatch)
    path.write_bytes(path.read_bytes()[:2000])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"expected the official \.tar\.gz"):
        data.prepare("cifar10", tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        data.prepare("cifar10", tmp_path, tmp_path / "nowhere.tar.gz")


# Downloads, room on the disk -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses on this machine are reached directly, whatever proxy it uses for others."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """A folder, and the address under which a server on this machine hands it out."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = served
    members, arrays = cifar_members()
    write_archive(folder / "cifar-10-python.tar.gz", members, monkeypatch)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    root = tmp_path / "not" / "yet"
    data.prepare("cifar10", root)
    assert_prepared(root, "cifar10", arrays, "official archive, md5 verified")
    assert (root / "cifar-10-python.tar.gz").is_file()  # kept: the next prepare needs no network


def test_download_of_something_else_or_of_nothing(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    (folder / "cifar-10-python.tar.gz").write_bytes(b"please log in")
    root = tmp_path / "sets"
    for url in (f"{address}/cifar-10-python.tar.gz", f"{address}/absent.tar.gz", "http://127.0.0.1:9/closed"):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(UserError, match=f"could not download {url}: .*put it into {root}"):
            data.prepare("cifar10", root)
        assert list(root.iterdir()) == []


def test_download_off(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is not there and downloading is off"):
        data.prepare("cifar10", tmp_path, download=False)


def test_not_enough_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_members()[0], monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"not enough disk under .*: 100 MB free, 185 MB needed"):
        data.prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_no_write_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the data root .*file/sets"):
        data.prepare("cifar10", tmp_path / "file" / "sets")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write to the data root"):
        data.prepare("cifar10", tmp_path)


def test_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_members()[0], monkeypatch)
    written = []

    def full(file: Any, *_: Any, **__: Any) -> None:
        written.append(file)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*cifar10: No space left on device"):
        data.prepare("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_interrupted_while_replacing_never_mixes_old_and_new(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder_of(tmp_path) / "test_labels.npy").unlink()  # the other three are of another set
    members, arrays = cifar_members()
    write_archive(tmp_path / "cifar-10-python.tar.gz", members, monkeypatch)
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.prepare("cifar10", tmp_path)
    with pytest.raises(UserError, match="missing"):
        data.load("cifar10", tmp_path)
    data.prepare("cifar10", tmp_path, download=False)
    assert_prepared(tmp_path, "cifar10", arrays, "official archive, md5 verified")


# SVHN ----------------------------------------------------------------------------------------------------------------


def write_mat(
    folder: Path, split: str, count: int, monkeypatch: pytest.MonkeyPatch, **replaced: Any
) -> tuple[Any, Any]:
    """`split`_32x32.mat as the official ones are: X [32, 32, 3, n], y [n, 1] with 10 for the digit 0."""
    images, labels = images_of(count), np.arange(count) % 10
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]}
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{split}_32x32.mat"
    scipy.io.savemat(path, {**content, **replaced}, do_compression=True)
    entry = ["http://127.0.0.1:9/", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    lists = {**torchvision.datasets.SVHN.split_list, split: entry}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    return images, labels


@pytest.mark.parametrize("place", ["root", "folder", "option"])
@pytest.mark.parametrize("name", ["svhn", "svhn_extra"])
def test_prepare_svhn(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "sets"
    folder = {"root": root, "folder": root / name, "option": tmp_path / "elsewhere"}[place]
    parts = {split: write_mat(folder, split, count, monkeypatch) for split, count in
             (("train", 20), ("extra", 15), ("test", 12))}  # fmt: skip
    data.prepare(name, root, folder if place == "option" else None, download=False)
    training = ["train", "extra"] if name == "svhn_extra" else ["train"]
    arrays = {
        "train_images": np.concatenate([parts[split][0] for split in training]),
        "train_labels": np.concatenate([parts[split][1] for split in training]),
        "test_images": parts["test"][0],
        "test_labels": parts["test"][1],
    }
    assert arrays["test_labels"].min() == 0 and arrays["test_labels"].max() == 9
    assert_prepared(root, name, arrays, "official files, md5 verified")
    assert data.prepare(name, root, download=False) == root / name  # the second time there is nothing to do


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"y": np.zeros((12, 1), np.uint8)}, "labels out of 1 to 10"),
        ({"y": np.full((12, 1), 11, np.uint8)}, "labels out of 1 to 10"),
        ({"y": np.ones((11, 1), np.uint8)}, r"X uint8 \[32, 32, 3, 12\] and 11 labels"),
        ({"X": np.zeros((32, 32, 3, 12))}, "X float64"),
        ({"X": np.zeros((12, 32, 32, 3), np.uint8)}, r"\[12, 32, 32, 3\]"),
    ],
)
def test_unexpected_mat_files_are_refused(
    replaced: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mat(tmp_path, "train", 12, monkeypatch)
    write_mat(tmp_path, "test", 12, monkeypatch, **replaced)
    with pytest.raises(UserError, match=words):
        data.prepare("svhn", tmp_path)
    assert not (tmp_path / "svhn").exists()


def test_svhn_md5_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mat(tmp_path, "test", 12, monkeypatch)
    with pytest.raises(UserError, match=r"train_32x32\.mat is not there and downloading is off"):
        svhn.prepare("svhn", tmp_path, download=False)
    with pytest.raises(UserError, match=r"could not download http://127\.0\.0\.1:9/"):
        write_mat(tmp_path, "train", 12, monkeypatch)
        (tmp_path / "train_32x32.mat").unlink()
        svhn.prepare("svhn", tmp_path)
    write_mat(tmp_path, "train", 12, monkeypatch)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: pytest.fail("read before its md5 was right"))
    with pytest.raises(UserError, match=r"train_32x32\.mat has md5 "):
        svhn.prepare("svhn", tmp_path)
    monkeypatch.undo()
    lists = {split: ["", f"{split}_32x32.mat", hashlib.md5((tmp_path / f"{split}_32x32.mat").read_bytes()).hexdigest()]
             for split in ("train", "test")}  # fmt: skip
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    with pytest.raises(UserError, match=r"cannot read .*train_32x32\.mat"):
        svhn.prepare("svhn", tmp_path)


@pytest.mark.parametrize("module", [cifar, svhn])
def test_prepare_refuses_names_of_other_sources(module: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown dataset 'digits'"):
        module.prepare("digits", tmp_path)


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
