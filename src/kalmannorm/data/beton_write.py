"""Implement `kalmannorm data ffcv`: write an image folder as FFCV's .beton files.

FFCV's writer waits forever when one of its workers dies. So it runs in a process of its own (this module as a program),
which prints a line for each image done and for each error. That process and its workers are ended after an error, or
when it prints nothing for `timeout` seconds.
"""

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from kalmannorm.data import folder, pixels
from kalmannorm.data.arrays import partial
from kalmannorm.data.beton import SOURCE, require_ffcv
from kalmannorm.errors import UserError

MODES = ("jpg", "raw")  # not FFCV's `proportion`, which compresses a random part, unseeded: no two files are the same
LARGEST = 1600  # pixels: an uncompressed image with this side still fits into FFCV's pages of 8 MiB
DONE, WRONG = "+", "!"  # first characters of the writer's lines
CHECK = 0.2  # seconds between two checks of the processes


@dataclass(frozen=True)
class Form:
    """How images are stored: as JPEG of a quality, or raw; the longer side is reduced to `max_resolution` pixels."""

    mode: str = "jpg"
    quality: int = 90
    max_resolution: int = 500  # as in the FFCV authors' ImageNet

    def check(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"--mode {self.mode}: expected {' or '.join(MODES)}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: expected 1 to 100")
        if not 1 <= self.max_resolution <= LARGEST:
            raise UserError(f"--max-resolution {self.max_resolution}: expected 1 to {LARGEST} pixels")


def write(
    dataset: Mapping[str, Any],
    root: Path,
    out: Path | None = None,
    *,
    form: Form | None = None,
    workers: int = 1,
    skip: bool = False,
    timeout: float = 600,
) -> Path:
    """Write train.beton, val.beton and beton.json to `out` (None: beside train/ and val/); return that folder.

    skip: read all images first, and leave out the unreadable ones; else the first of these is an error. UserError: no
    such data set; an unreadable image; a worker died; no image done for `timeout` seconds. Then no file is left behind.
    """
    require_ffcv()
    form = form or Form()
    form.check()
    images = folder.load(root, dataset)
    if skip:
        images = images.without(folder.find_unreadable(images, workers))
    out = out or folder.find(root, dataset)
    with partial(out) as temporary:
        sizes = {}
        for split, files in zip(folder.SPLITS, (images.train, images.test), strict=True):
            np.savez(temporary / "files.npz", names=files.names, labels=files.labels)
            _watched(files, temporary / f"{split}.beton", form, workers, timeout)
            sizes[split] = (temporary / f"{split}.beton").stat().st_size
        written = {**asdict(form), "ffcv": version("ffcv")}
        source = {"classes": images.classes, "bytes": sizes, "written": written, "provenance": images.provenance}
        (temporary / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        (out / SOURCE).unlink(missing_ok=True)  # so that no old description lies beside new files
        for name in (*(f"{split}.beton" for split in folder.SPLITS), SOURCE):
            (temporary / name).replace(out / name)
    return out


# In the command's process ---------------------------------------------------------------------------------------------


def _watched(files: folder.Files, file: Path, form: Form, workers: int, timeout: float) -> None:
    from rich.console import Console
    from rich.progress import Progress

    task = {"root": str(files.root), "file": str(file), "workers": max(1, workers), "form": asdict(form)}
    log = file.with_suffix(".log")
    with log.open("wb") as stderr:
        writer = subprocess.Popen(
            [sys.executable, "-m", "kalmannorm.data.beton_write", json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # so that it can be ended with its workers
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(writer.stdout, lines), daemon=True).start()
    done = 0
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            shown = bar.add_task(f"writing {file.name}", total=len(files))
            while (line := lines.get(timeout=timeout)) is not None:
                if line.startswith(WRONG):
                    raise UserError(f"{line[1:].strip()}{_last_line(log)}")
                done += 1
                bar.update(shown, completed=done)
    except queue.Empty:
        raise UserError(
            f"FFCV's writer did nothing for {timeout:.0f} s after {done} of {len(files)} images{_last_line(log)}"
        ) from None
    finally:
        _end(writer)
    if writer.returncode or done < len(files):
        raise UserError(f"FFCV did not write {file.name}, after {done} of {len(files)} images{_last_line(log)}")


def _read(stream: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _last_line(log: Path) -> str:
    """Return the last line that FFCV or Python wrote to the log, in brackets, "" if there is none."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1].strip()})" if lines else ""


def _end(writer: "subprocess.Popen[str]") -> None:
    """End the remaining processes of the writer's group. SIGTERM comes first: the process that frees shared memory
    ignores it, and ends by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(20):
            writer.poll()
            try:
                os.killpg(writer.pid, number)
            except ProcessLookupError:
                break
            time.sleep(CHECK)
    writer.wait()


# In the writer's process ----------------------------------------------------------------------------------------------


def _say(kind: str, text: str = "") -> None:
    """Write a line in one call, so that lines of several processes do not mix."""
    os.write(sys.stdout.fileno(), f"{kind}{text}\n".encode())


class _Samples:
    """The data set for FFCV's writer: index -> (image, label)."""

    def __init__(self, files: folder.Files) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image = np.asarray(pixels.read_rgb(self.files.path(index)))
        except pixels.Unreadable as error:
            _say(WRONG, f"{error}; repair or remove it, or pass --skip-unreadable")
            raise SystemExit(1) from None
        _say(DONE)
        return image, int(self.files.labels[index])


class _Worker(multiprocessing.Process):
    """Replaces the processes of FFCV's writer, which does not notice their death, and lists them."""

    started: ClassVar[list["_Worker"]] = []

    def start(self) -> None:
        super().start()
        self.started.append(self)


def _watch() -> None:
    while not any(worker.exitcode for worker in _Worker.started):
        time.sleep(CHECK)
    time.sleep(5 * CHECK)  # so that the worker's own message comes first
    _say(WRONG, "a worker of FFCV's writer died")


def main(task: Mapping[str, Any]) -> None:
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    ffcv.writer.Process = _Worker
    threading.Thread(target=_watch, daemon=True).start()
    form, file = Form(**task["form"]), Path(task["file"])
    with np.load(file.parent / "files.npz") as stored:
        files = folder.Files(Path(task["root"]), stored["names"], stored["labels"])
    image = RGBImageField(write_mode=form.mode, max_resolution=form.max_resolution, jpeg_quality=form.quality)
    writer = ffcv.writer.DatasetWriter(str(file), {"image": image, "label": IntField()}, num_workers=task["workers"])
    chunk = min(100, max(1, len(files) // task["workers"]))
    writer.from_indexed_dataset(_Samples(files), chunksize=chunk)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
