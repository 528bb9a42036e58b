"""Show a sweep's progress: a live table of its runs on a terminal, elsewhere a line for every event."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kalmannorm.experiments.config import Config, describe
from kalmannorm.experiments.predict import duration
from kalmannorm.experiments.record import run_id

WAITING, RUNNING, ELSEWHERE, DONE, FAILED, REFUSED = "waiting", "running", "elsewhere", "done", "failed", "refused"
COLOURS = {RUNNING: "cyan", ELSEWHERE: "magenta", DONE: "green", FAILED: "red", REFUSED: "red"}


class Job:
    """A run of a sweep, and its state. `key`: of its row in the card."""

    def __init__(self, config: Config, key: str, devices: int, device_seconds: float | None) -> None:
        self.config, self.key, self.devices = config, key, devices
        self.device_seconds = device_seconds  # predicted; None if no run like it is recorded
        self.identity = run_id(config)
        self.folder = Path(config.runs) / self.identity
        self.state = WAITING
        self.reason = ""  # why it failed, or which process works on it
        self.attempts = 0
        self.began = 0.0
        self.seconds = 0.0

    @property
    def predicted(self) -> float | None:
        """Predicted seconds on the devices that it gets; None if not known."""
        return None if self.device_seconds is None else self.device_seconds / self.devices

    def progress(self) -> dict[str, Any]:
        """Return the run's last progress report (train/progress.py); {} if there is none in this attempt."""
        file = self.folder / "progress.json"
        try:
            if file.stat().st_mtime < self.began:
                return {}
            found = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):  # there is none yet, or it is being written
            return {}
        right = isinstance(found, dict) and all(
            type(found.get(key)) in (int, float) for key in ("part", "seconds_left")
        )
        return found if right and "status" in found else {}

    def seconds_left(self) -> float | None:
        if self.state == RUNNING and (left := self.progress().get("seconds_left")) is not None:
            return float(left)
        if self.predicted is None:
            return None
        return max(0.0, self.predicted - (time.time() - self.began if self.state == RUNNING else 0))


@dataclass
class Board:
    """Shows the jobs of a sweep, as a context around its loop. `jobs`: those not done before, of `total`; `parallel`:
    how many run at once."""

    jobs: list[Job]
    total: int
    parallel: int

    def __post_init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, job: Job, text: str) -> None:
        """Print a line about an event of a run."""
        ended = self.total - sum(j.state in (WAITING, RUNNING, ELSEWHERE) for j in self.jobs)
        line = f"[{ended}/{self.total}] {job.identity} {job.key} {describe(job.config.result())}: {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def counts(self) -> str:
        """Return a line with the number of runs in each state and the time left."""
        counted = {state: sum(job.state == state for job in self.jobs) for state in COLOURS}
        counted[DONE] += self.total - len(self.jobs)
        parts = [f"{number} {state}" for state, number in counted.items() if number]
        waiting = sum(job.state == WAITING for job in self.jobs)
        parts += [f"{waiting} {WAITING}"] if waiting else []
        return ", ".join([*parts, *self._time_left()])

    def _time_left(self) -> list[str]:
        left = [job.seconds_left() for job in self.jobs if job.state in (WAITING, RUNNING, ELSEWHERE)]
        known = [seconds for seconds in left if seconds is not None]
        if not known:
            return ["time left not known"] if left else []
        # At least as long as the longest run, and as all runs together on all slots.
        guess = max(max(known), sum(known) / len(known) * len(left) / self.parallel)
        return [f"about {duration(guess)} left"]

    def _render(self) -> Group:
        """Draw the table: running and failed runs first, then, as far as there is room, the last done and the next."""
        table = Table(box=None, padding=(0, 1), show_header=False)
        order = (RUNNING, ELSEWHERE, FAILED, REFUSED, DONE, WAITING)
        rows = sorted(self.jobs, key=lambda job: (order.index(job.state), -job.began if job.state == DONE else 0))
        for job in rows[: max(3, self._console.height - 4)]:
            state = Text(job.state, COLOURS.get(job.state, "dim"))
            table.add_row(
                job.identity, job.key, describe(job.config.result()), state, Text(self._note(job), overflow="ellipsis")
            )
        return Group(table, Text(self.counts(), "bold"))

    @staticmethod
    def _note(job: Job) -> str:
        if job.state == RUNNING:
            now = job.progress()
            if not now:
                return f"{duration(time.time() - job.began)}"
            return f"{100 * now['part']:.0f} %  {now['status']}  {duration(now['seconds_left'])} left"
        return job.reason or (duration(job.seconds) if job.seconds else "")
