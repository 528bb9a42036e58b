"""Read videos in Kinetics's layout, {train,val}/CLASS/FILE, decoded by PyAV (`pip install -e '.[video]'`).

If train.txt or val.txt lies beside the folders, the split has only the files listed there, one CLASS/FILE per line.
A clip has every `interval`-th frame; in a video that is too short, the last frame is repeated. Training: one clip at a
random place, short side resized to 256 to 320, a random crop of 224 (in proportion for other sizes), flip; all drawn
from the video's key (stream.py). Evaluation: the wanted number of clips, spread evenly, and the centre crop.
"""

import codecs
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kalmannorm.data import folder
from kalmannorm.data.folder import Files, Images, Kind
from kalmannorm.data.pixels import Unreadable
from kalmannorm.data.stream import UNAUGMENTED, Decoding, Sample
from kalmannorm.errors import UserError, reason

VIDEOS = Kind(
    "videos",
    (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp"),
    "expected Kinetics's layout, train/CLASS/*.mp4 and val/CLASS/*.mp4",
    "PyAV; clips, crops and flips keyed by (seed, epoch, position)",
)
SHORT, LONG = 256 / 224, 320 / 224  # range of the short side, in crops, in training; SHORT in evaluation
CLIPS_AT_ONCE = 16  # in evaluation, approximately
MOST_PIXELS = 2**26  # of a frame: a file with more is refused


def load(root: Path, dataset: Mapping[str, Any]) -> Images:
    """Return the files of the data set. UserError: it is missing, or has another layout; PyAV is missing; a list names
    a missing file."""
    try:
        import av  # noqa: F401
    except ImportError:
        missing = "PyAV, which decodes them, is not installed: pip install -e '.[video]'"
        raise UserError(f"data set {dataset['name']!r} is of videos, and {missing}") from None
    found = folder.load(root, dataset, VIDEOS)
    train, test = (_listed(files) for files in (found.train, found.test))
    provenance = found.provenance
    if len(train) + len(test) < len(found.train) + len(found.test):  # another list is another set
        listed = hashlib.sha256(provenance["sha256"].encode())
        for files in (train, test):
            listed.update(b"\n".join(files.names.tolist()) + b"\0")
        counts = len(train), len(test)
        provenance = provenance | {
            "files": sum(counts),
            "fidelity": folder.fidelity(counts, dataset.get("published")),
            "sha256": listed.hexdigest(),
        }
    return Images(train, test, found.classes, provenance)


def _listed(files: Files) -> Files:
    """Return the files that the split's list names, or all if there is no list. UserError: a bad list."""
    file = files.root.with_suffix(".txt")
    if not file.exists():
        return files
    place = {name: index for index, name in enumerate(files.names.tolist())}
    chosen = []
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        if name not in place:
            raise UserError(f"{file}, line {number}: {os.fsdecode(name)} is not in {files.root}; expected CLASS/FILE")
        chosen.append(place[name])
    if not chosen:
        raise UserError(f"{file} names no video; remove it, or list CLASS/FILE a line")
    return files.take(np.array(sorted(set(chosen))))


def read_frames(path: Path, choose: Callable[[int], Sequence[int]], short: int) -> np.ndarray:
    """Return the chosen frames, uint8 [n, H, W, 3], upright, with the shorter side `short`.

    choose: number of frames -> indices of the wanted ones, in any order, also repeated. Unreadable: the file is no
    video, is damaged, or ends before the last chosen frame.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = _video(container, path)
            if not 0 < stream.width * stream.height <= MOST_PIXELS:
                raise Unreadable(f"{path}: frames of {stream.width} x {stream.height} pixels")
            count = _frames(path)
            wanted = [min(index, count - 1) for index in choose(count)] if count else []
            if not wanted:
                raise Unreadable(f"{path}: it has no frames")
            scale = short / min(stream.width, stream.height)
            size = [max(short, round(side * scale)) for side in (stream.width, stream.height)]
            found: dict[int, np.ndarray] = {}
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    pixels = frame.to_ndarray(width=size[0], height=size[1], format="rgb24")
                    found[index] = np.rot90(pixels, round(frame.rotation / 90))  # counterclockwise, as phones have it
                if index == max(wanted):
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(f"{path}: {reason(error)}") from None
    if max(wanted) not in found:
        raise Unreadable(f"{path}: it ends before frame {max(wanted) + 1} of {count}")
    return np.stack([found[index] for index in wanted])


def _video(container: Any, path: Path) -> Any:
    """Return the video stream. Unreadable: there is none, or only the cover picture of a sound file."""
    from av.stream import Disposition

    films = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not films:
        raise Unreadable(f"{path}: it has no video")
    return films[0]


def _frames(path: Path) -> int:
    """Count the frames that are shown. The number in the file may be larger: an edit list may leave frames out, and VP8
    has frames that are not shown. Unreadable: a frame is not whole, as in an .mp4 that was cut off behind its index.
    """
    import av

    with av.open(str(path)) as container:
        stream = _video(container, path)
        hides = stream.codec_context.name == "vp8"
        count = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise Unreadable(f"{path}: a frame is not whole, the file is damaged or was cut off")
            if packet.size > 0 and not packet.is_discard:
                count += bytes(packet)[0] >> 4 & 1 if hides else 1  # show_frame (RFC 6386, 9.1)
        return count


def clip(start: float, count: int, frames: int, interval: int) -> list[int]:
    """Return a clip's frame indices in a video of `count`. start: 0 (first possible start) to 1 (last possible one)."""
    first = round(start * max(0, count - 1 - (frames - 1) * interval))
    return [min(first + number * interval, count - 1) for number in range(frames)]


class VideoLoader(Decoding):
    """Batches of clips [n, 3, frames, size, size] of one split.

    views: clips of each video in `unaugmented`, [n, views, 3, ...]; None: the one in the middle, without the dimension.
    """

    at_once = CLIPS_AT_ONCE
    remedy = "; repair it, or leave it out of the folder or the list"

    def __init__(
        self,
        files: Files,
        *,
        size: int,
        flip: bool,
        frames: int,
        interval: int,
        views: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(_Decode(files, size, flip, frames, interval, views), len(files), **options)
        self.views = views
        self.mean, self.std = (each.view(3, 1, 1, 1) for each in (self.mean, self.std))


class _Decode(Dataset[Sample]):
    """Map (index, key) to a clip and its label."""

    def __init__(self, files: Files, size: int, flip: bool, frames: int, interval: int, views: int | None) -> None:
        self.files, self.size, self.flip, self.frames, self.interval = files, size, flip, frames, interval
        self.starts = [0.5] if views in (None, 1) else [view / (views - 1) for view in range(views or 0)]
        self.views = views

    def __getitem__(self, drawn: tuple[int, int]) -> Sample:
        index, key = drawn
        pixels = self._unaugmented(index) if key == UNAUGMENTED else self._augmented(index, key)
        return pixels, int(self.files.labels[index])

    def _augmented(self, index: int, key: int) -> Tensor:
        generator = torch.Generator().manual_seed(key)
        start, side, top, left, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        short = round(self.size * (SHORT + side * (LONG - SHORT)))
        found = self._read(index, lambda count: clip(start, count, self.frames, self.interval), short)
        height, width = found.shape[-2:]
        y, x = (int(place * (length - self.size + 1)) for place, length in ((top, height), (left, width)))
        found = found[..., y : y + self.size, x : x + self.size]
        return (found.flip(-1) if self.flip and mirror < 0.5 else found).contiguous()

    def _unaugmented(self, index: int) -> Tensor:
        def choose(count: int) -> list[int]:
            return [frame for start in self.starts for frame in clip(start, count, self.frames, self.interval)]

        found = self._read(index, choose, round(self.size * SHORT))
        height, width = found.shape[-2:]
        y, x = (height - self.size) // 2, (width - self.size) // 2
        found = found[..., y : y + self.size, x : x + self.size]
        if self.views is None:
            return found.contiguous()
        return found.unflatten(1, (self.views, self.frames)).transpose(0, 1).contiguous()

    def _read(self, index: int, choose: Callable[[int], Sequence[int]], short: int) -> Tensor:
        """Return uint8 [3, n, H, W]."""
        return torch.from_numpy(read_frames(self.files.path(index), choose, short)).permute(3, 0, 1, 2)
