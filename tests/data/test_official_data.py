"""Data sets from their official archives: what is prepared, downloaded, and refused with which words.

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
import socket
import struct
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from array_files import RANDOM, Touch, folder_of, images_of

from kalmannorm import data
from kalmannorm.data import cifar
from kalmannorm.errors import UserError

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
    assert source["dataset"] == name and source["archive_md5"] == {
        archive.name: hashlib.md5(archive.read_bytes()).hexdigest()
    }
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
    ended = subprocess.Popen(["true"])
    ended.wait()
    # Of a killed process that had our number, of another one, and of one that lives.
    numbers = (os.getpid(), ended.pid, os.getppid())
    left = [tmp_path / f".cifar10.{socket.gethostname()}.{number}.partial" for number in numbers]
    for stale in left:
        stale.mkdir()
    members, arrays = cifar_members()
    write_archive(folder / "cifar-10-python.tar.gz", members, monkeypatch)
    data.prepare("cifar10", tmp_path, download=False)
    assert [stale.exists() for stale in left] == [False, False, True]
    left[2].rmdir()
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
        data.prepare("cifar10", tmp_path)
    with pytest.raises(UserError, match=r"give the official cifar-10-python\.tar\.gz by --archive$"):  # not: delete it
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
    with pytest.raises(UserError, match=r": 95 MiB free, 176 MiB needed; give another by --root"):
        data.prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_no_write_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/sets: .*; give another by --root"):
        data.prepare("cifar10", tmp_path / "file" / "sets")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write to .*; give another by --root"):
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
        data.prepare("svhn", tmp_path, download=False)
    with pytest.raises(UserError, match=r"could not download http://127\.0\.0\.1:9/"):
        write_mat(tmp_path, "train", 12, monkeypatch)
        (tmp_path / "train_32x32.mat").unlink()
        data.prepare("svhn", tmp_path)
    write_mat(tmp_path, "train", 12, monkeypatch)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: pytest.fail("read before its md5 was right"))
    with pytest.raises(UserError, match=r"train_32x32\.mat has md5 "):
        data.prepare("svhn", tmp_path)
    monkeypatch.undo()
    lists = {split: ["", f"{split}_32x32.mat", hashlib.md5((tmp_path / f"{split}_32x32.mat").read_bytes()).hexdigest()]
             for split in ("train", "test")}  # fmt: skip
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    with pytest.raises(UserError, match=r"cannot read .*train_32x32\.mat"):
        data.prepare("svhn", tmp_path)
