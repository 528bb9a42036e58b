"""Small films in Kinetics's layout: every frame of a film has a grey of its own, by which a test knows it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

SMALL = [
    "dataset=kinetics",
    "dataset.classes=2",
    "dataset.frames=4",
    "dataset.interval=1",
    "dataset.views=3",
    "arch=i3d_small",
    "arch.width=0.0625",
    "schedule=kinetics_step",
    "batch=g8_s2",
    "batch.grad_batch=4",
    "budget=smoke",
    "budget.subset=8",
    "budget.size=32",
    "device=cpu",
    "precision=fp32",
    "compile=false",
    "workers=0",
]


def film(
    file: Path,
    greys: Sequence[int],
    size: tuple[int, int] = (48, 40),
    codec: str = "ffv1",
    left_out: int = 0,
    hidden: Sequence[int] = (),
) -> Path:
    """Write frames of these greys; size: width and height. ffv1 loses nothing, and does not say how many there are.

    left_out: as many of an .mp4's first frames are not shown, by its edit list. hidden: frames that VP8 does not show.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w", options={"avoid_negative_ts": "disabled"}) as container:
        numbers = itertools.count()

        def mux(packets: list[av.Packet]) -> None:
            for packet in packets:
                if next(numbers) in hidden:
                    content = bytearray(packet)
                    content[0] &= ~0x10
                    packet.update(content)
                for name in ("pts", "dts"):
                    setattr(packet, name, getattr(packet, name) - round(left_out / 25 / packet.time_base))
                container.mux(packet)

        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for grey in greys:
            pixels = np.full((size[1], size[0], 3), grey, dtype=np.uint8)
            mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        mux(stream.encode())
    return file


def write(root: Path, name: str = "kinetics", train: int = 4, test: int = 3, length: int = 9) -> Path:
    """root/NAME: films that get brighter are of one class, those that get darker of the other."""
    for split, count in (("train", train), ("val", test)):
        for number in range(count):
            rising = [20 + 10 * number + 16 * frame for frame in range(length)]
            film(root / name / split / "brighter" / f"{number}.mkv", rising)
            film(root / name / split / "darker" / f"{number}.mp4", rising[::-1], codec="mpeg4")
    return root / name
