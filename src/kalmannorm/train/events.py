"""TensorBoard's event file of a run, rewritten at each epoch from the curves that checkpoints hold.

A run that was killed and resumed therefore has every point once. As the file only grows, TensorBoard can read on from
where it was.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from kalmannorm.experiments.record import Curves
from kalmannorm.files import write_atomically

FOLDER = "tensorboard"  # in the run's folder
NAME = "events.out.tfevents.kalmannorm"  # TensorBoard looks for "tfevents"
PLACE = ("epoch", "step")  # curves that say where a point lies


def write(folder: Path, curves: Curves, times: Sequence[float]) -> None:
    """Write a run's curves. `times`: the ends of its epochs, in seconds since 1970. UserError: no space, permission."""
    write_atomically(folder / FOLDER / NAME, encode(curves, times))


def encode(curves: Curves, times: Sequence[float]) -> bytes:
    """Return the content of an event file: a scalar per curve and epoch, at the epoch's last step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    records.write(Event(wall_time=times[0] if times else 0.0, file_version="brain.Event:2").SerializeToString())
    for at, (step, time) in enumerate(zip(curves["step"], times, strict=True)):
        for key in sorted(curves.keys() - set(PLACE)):
            value = curves[key][at]
            if value is not None:
                scalar = Summary(value=[Summary.Value(tag=key, simple_value=value)])
                records.write(Event(wall_time=time, step=step, summary=scalar).SerializeToString())
    return buffer.getvalue()


def clear(folder: Path) -> None:
    """Remove event files of other writers: TensorBoard would show their points too."""
    for file in (folder / FOLDER).glob("*tfevents*"):
        if file.name != NAME:
            file.unlink(missing_ok=True)
