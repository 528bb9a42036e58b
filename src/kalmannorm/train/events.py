"""TensorBoard's event file of a run, written anew at each epoch from the curves that checkpoints hold.

So a run that was killed and went on has every point once. TensorBoard reads on from where it was: the file only grows.
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
    """Write the curves of a run, whose epochs ended at `times` (since 1970). UserError: no space, no permission."""
    write_atomically(folder / FOLDER / NAME, encode(curves, times))


def encode(curves: Curves, times: Sequence[float]) -> bytes:
    """Return the content of an event file: scalars by curve, at the curves' steps."""
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
    """Remove event files of other writers, whose points would stand beside these."""
    for file in (folder / FOLDER).glob("*tfevents*"):
        if file.name != NAME:
            file.unlink(missing_ok=True)
