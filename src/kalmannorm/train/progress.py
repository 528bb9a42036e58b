"""Show a run's progress: a bar on a terminal, elsewhere a line per epoch; and TensorBoard's event files."""

import json
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Curves
from kalmannorm.train import events

FILE = "progress.json"  # in the run's folder, for a sweep that watches from another process
FILE_EVERY = 2.0  # seconds


class Progress(AbstractContextManager["Progress"]):
    """Shows a run's progress and counts this process's seconds and images. As a context, it cleans up the terminal."""

    def __init__(self, identity: str, config: Config, quiet: bool = False) -> None:
        norm, batch = config.norm, config.batch
        statistics = "" if batch.stat_batch is None else f" ({batch.grad_batch},{batch.stat_batch})"
        self.title = f"{identity} {norm.name}{statistics} seed {config.seed}"
        self.epochs = config.budget.epochs
        self.quiet = quiet  # for all ranks but one of a distributed run
        self.images = 0
        self._began = time.perf_counter()
        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, first: int, total: int, batch: int, folder: Path, curves: Curves) -> None:
        """Start after `first` of `total` steps of `batch` images. `curves`: of the epochs so far, in a resumed run."""
        self._first, self._total, self._batch = first, total, batch
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=total, completed=first, status="")
        self._training = time.perf_counter()
        if self.quiet:
            return
        self._folder, self._written = folder, 0.0
        self._times = [time.time()] * len(curves["epoch"])
        events.clear(folder)
        if self._times:
            events.write(folder, curves, self._times)

    def step(self, done: int, loss: float, accuracy: float | None = None) -> None:
        """Show the number of steps done, the epoch's mean loss and, for a classifier, its accuracy in percent."""
        self.images = (done - self._first) * self._batch
        rate = self.images / (time.perf_counter() - self._training)
        correct = "" if accuracy is None else f"accuracy {accuracy:.1f} %  "
        status = f"loss {loss:.3f}  {correct}{_rate(rate)} images/s"
        self._bar.update(self._task, completed=done, status=status)
        if not self.quiet and time.perf_counter() - self._written > FILE_EVERY:
            self._written = time.perf_counter()
            left = self.seconds / (done - self._first) * (self._total - done)
            now = {"part": done / self._total, "status": status, "seconds_left": round(left, 1)}
            with suppress(OSError):  # progress is not worth failing for: on a full disk, the next checkpoint fails
                (self._folder / FILE).write_text(json.dumps(now))

    def epoch(self, curves: Curves) -> None:
        """Show that an epoch is done and evaluated: on a terminal the bar does, else a line."""
        if self.quiet:
            return
        self._times.append(time.time())
        events.write(self._folder, curves, self._times)
        now = {key: values[-1] for key, values in curves.items()}
        if self._bar.disable:
            done = max(1, now["step"] - self._first)  # 0 if only the evaluation of an epoch was left to do
            left = self.seconds / done * (self._total - now["step"])
            tested = "".join(f"{kind} {now[kind]:.2f} %  " for kind in ("moving", "online") if kind in now)
            print(
                f"{self.title}  epoch {now['epoch']}/{self.epochs}  loss {now['train_loss']:.3f}  {tested}"
                f"{_rate(self.images / self.seconds)} images/s  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:.{0 if images_per_s >= 10 else 2}f}"
