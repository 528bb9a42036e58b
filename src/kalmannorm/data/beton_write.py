"""`kalmannorm data ffcv`: an image folder as FFCV's .beton files.

FFCV's writer waits forever when one of its workers dies. So it runs in a process of its own, whose workers report what
they cannot read and are watched; it is ended when one of them fails, or when nothing moves for `timeout` seconds.
"""

import json
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kalmannorm.data import folder
from kalmannorm.data.arrays import partial
from kalmannorm.data.beton import SOURCE, require_ffcv
from kalmannorm.errors import UserError

MODES = ("jpg", "raw")  # FFCV's `proportion` draws which images to compress, unseeded: no two files would be the same
LARGEST = 1600  # pixels: an uncompressed image of that side fits into FFCV's pages of 8 MiB
CHECK = 0.2  # seconds between two looks at the writer


@dataclass(frozen=True)
class Form:
    """How images are stored: JPEG of a quality, or raw; the longer side is brought down to `max_resolution` pixels."""

    mode: str = "jpg"
    quality: int = 90
    max_resolution: int = 500  # as the FFCV authors' ImageNet

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
    timeout: float = 300,
) -> Path:
    """Writes train.beton, val.beton and beton.json to `out` (None: beside train/ and val/); returns that folder.

    skip: leave out images that cannot be read, after looking at all of them; else the first one ends it. UserError: no
    such data set; an unreadable image; a worker that died; nothing done for `timeout` seconds. Nothing is left behind.
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
            _watched(files, temporary / f"{split}.beton", form, workers, timeout)
            sizes[split] = (temporary / f"{split}.beton").stat().st_size
        written = {**vars(form), "ffcv": version("ffcv")}
        source = {"classes": images.classes, "bytes": sizes, "written": written, "provenance": images.provenance}
        (temporary / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        (out / SOURCE).unlink(missing_ok=True)  # new files never stand under an old description
        for name in (*(f"{split}.beton" for split in folder.SPLITS), SOURCE):
            (temporary / name).replace(out / name)
    return out


def _watched(files: folder.Files, file: Path, form: Form, workers: int, timeout: float) -> None:
    from rich.console import Console
    from rich.progress import Progress

    context = multiprocessing.get_context("spawn")
    done, problems = context.Value("q", 0), context.Queue()
    with tempfile.NamedTemporaryFile(prefix="kalmannorm-ffcv-") as log:
        writer = context.Process(target=_write, args=(files, str(file), form, workers, done, problems, log.name))
        writer.start()
        try:
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(f"writing {file.name}", total=len(files))
                seen, moved = 0, time.monotonic()
                while writer.is_alive():
                    problem = _get(problems, CHECK)
                    if done.value > seen:
                        seen, moved = done.value, time.monotonic()
                        bar.update(task, completed=seen)
                    if problem is None and time.monotonic() - moved > timeout:
                        problem = f"FFCV's writer did nothing for {timeout:.0f} s after {seen} of {len(files)} images"
                    if problem is not None:
                        raise UserError(f"{problem}{_last_line(log.name)}")
            problem = _get(problems, 0)
            if problem is not None or writer.exitcode:
                raise UserError(f"{problem or f'FFCV did not write {file}'}{_last_line(log.name)}")
        finally:
            _end(writer)


def _write(files: folder.Files, file: str, form: Form, workers: int, done: Any, problems: Any, log: str) -> None:
    """The writer's process, in a process group of its own, so that it can be ended with its workers."""
    os.setsid()
    os.environ["TQDM_DISABLE"] = "1"
    with Path(log).open("a") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    threading.Thread(target=_watch_children, args=(problems,), daemon=True).start()
    image = RGBImageField(write_mode=form.mode, max_resolution=form.max_resolution, jpeg_quality=form.quality)
    writer = DatasetWriter(file, {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(_Samples(files, done, problems), chunksize=min(100, max(1, len(files) // workers)))


class _Samples:
    """What FFCV asks for: index -> image, label."""

    def __init__(self, files: folder.Files, done: Any, problems: Any) -> None:
        self.files, self.done, self.problems = files, done, problems

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image = np.asarray(folder.read_rgb(self.files.path(index)))
        except folder.Unreadable as error:
            self.problems.put(f"{error}; repair or remove it, or pass --skip-unreadable")
            raise
        with self.done.get_lock():
            self.done.value += 1
        return image, int(self.files.labels[index])


def _watch_children(problems: Any) -> None:
    seen: set[Any] = set()
    while True:
        seen |= set(multiprocessing.active_children())
        if any(child.exitcode not in (None, 0) for child in seen):
            time.sleep(5 * CHECK)  # what it said itself comes first
            problems.put("a worker of FFCV's writer died")
            return
        time.sleep(CHECK)


def _get(problems: Any, seconds: float) -> str | None:
    try:
        return str(problems.get(timeout=seconds))
    except queue.Empty:
        return None


def _last_line(log: str) -> str:
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1].strip()})" if lines else ""


def _end(writer: Any) -> None:
    """Ends what is left of the process group. SIGTERM first: it spares the process that frees shared memory, which goes
    by itself."""
    if writer.is_alive():
        writer.terminate()
        writer.join(5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(20):
            try:
                os.killpg(writer.pid, number)
            except ProcessLookupError:
                writer.join()
                return
            time.sleep(CHECK)
