"""A sweep: run those runs of an experiment that have no finished record yet."""

import math
import signal
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kalmannorm import machine
from kalmannorm.errors import Stopped, UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.cards import Experiment, load
from kalmannorm.experiments.config import Config, batches, check_batches
from kalmannorm.experiments.predict import duration, predictor
from kalmannorm.experiments.settings import CocoDataset, FilesDataset
from kalmannorm.files import check_writable
from kalmannorm.runs.display import DONE, ELSEWHERE, FAILED, REFUSED, RUNNING, WAITING, Board, Job
from kalmannorm.runs.job import LOG, Outcome, write_failed
from kalmannorm.runs.lock import holder
from kalmannorm.runs.placement import Options, split
from kalmannorm.stopping import STOP_SIGNALS, drop_terminal, handling

LOOK_EVERY = 2.0  # seconds between checks of runs that other processes work on
STOP_SECONDS = 120.0  # that runs have to save themselves before they are killed
LOG_LINES = 15  # last lines of a failed run's log that are shown


class Launcher(Protocol):
    """Executes runs, in processes of this machine or of others."""

    @property
    def title(self) -> str: ...
    @property
    def parallel(self) -> int: ...  # runs at once
    @property
    def devices(self) -> int: ...  # most devices that one run can have

    def room(self, devices: int) -> bool: ...
    def start(self, config: Config, devices: int) -> None: ...
    def ended(self, timeout: float) -> list[tuple[str, Outcome]]: ...
    def ask_to_stop(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


def sweep(name: str, arguments: list[str], dry_run: bool = False) -> int:
    """Run what an experiment is missing, whatever fails on the way. Return 1 if a run failed, else 0.

    `arguments`: overrides, and those that placement.HELP describes. `dry_run`: only list the runs. UserError: as run.
    """
    options, arguments = split(arguments)
    experiment = load(name, arguments)
    kind = experiment.card.kind
    if kind == "parameters":
        print(f"{name}: nothing to run; kalmannorm report {name} counts", file=sys.stderr)
        return 0
    if kind == "speed":
        from kalmannorm.runs.measure_speed import measure

        return measure(experiment, dry_run)
    return run(experiment, options, dry_run)


def run(experiment: Experiment, options: Options, dry_run: bool = False) -> int:
    """Run what a loaded experiment is missing. Return 1 if a run failed, else 0.

    UserError: nothing could run, with the reason. KeyboardInterrupt, Stopped: a signal; the same command continues the
    sweep.
    """
    if (world := machine.launch().world) > 1:
        raise UserError(f"a sweep starts processes itself: without torchrun, pass devices={world}")
    found = records.current(records.read_all(experiment.runs[0].results))
    done = {record["id"] for record in found if record["status"] == "done"}
    device = experiment.runs[0].device
    predict = predictor(found, device)
    asked = options.devices or (experiment.card.devices if device == "cuda" else 1)
    asked = min(asked, options.gpu_count or asked)
    jobs = []
    for key, config in zip(experiment.keys, experiment.runs, strict=True):
        jobs.append(Job(config, key, _devices(config, asked), predict(config.result())))
    missing = [job for job in jobs if job.identity not in done]
    _announce(experiment, jobs, missing, list_all=dry_run)
    if dry_run or not missing:
        return 0
    check_writable(records.path(missing[0].config.results, "").parent)
    _check_data(missing)
    if options.launcher != "local":
        _make_paths_absolute(missing)
    launcher = _launcher(options, missing[0].config, len(missing))
    print(launcher.title, file=sys.stderr)
    try:
        for job in missing:
            job.devices = _devices(job.config, min(job.devices, launcher.devices))
        with Board(missing, len(jobs), launcher.parallel) as board:
            _run_jobs(missing, launcher, board, options.retries)
    finally:
        launcher.close()
    return _conclude(missing)


def _run_jobs(jobs: list[Job], launcher: Launcher, board: Board, retries: int) -> None:
    """Start runs whenever there is room, and handle those that ended, until none is left."""
    waiting, elsewhere = deque(jobs), list[Job]()
    running: dict[str, Job] = {}
    looked, asked = -math.inf, list[int]()  # the signals that asked the sweep to stop, in order

    def note(number: int, _: object) -> None:
        drop_terminal(number)
        asked.append(number)

    with handling((signal.SIGINT, *STOP_SIGNALS), note):
        while waiting or running or elsewhere:
            while waiting and launcher.room(waiting[0].devices) and not asked:
                job = waiting.popleft()
                if (who := holder(job.config.runs, job.identity)) is not None:
                    elsewhere.append(_mark_elsewhere(job, who, board))
                    continue
                job.state, job.began, job.attempts = RUNNING, time.time(), job.attempts + 1
                running[job.identity] = job
                launcher.start(job.config, job.devices)
                board.say(job, "started" if job.attempts == 1 else f"started again, attempt {job.attempts}")
            for identity, outcome in launcher.ended(0.5):
                job = running.pop(identity)
                _handle_outcome(job, outcome, board, retries)
                if job.state == ELSEWHERE:
                    elsewhere.append(job)
                elif job.state == WAITING:
                    waiting.append(job)
            if time.monotonic() - looked > LOOK_EVERY:
                looked = time.monotonic()
                for job in [job for job in elsewhere if holder(job.config.runs, job.identity) is None]:
                    elsewhere.remove(job)
                    if records.is_done(job.config.results, job.identity):
                        job.state, job.reason = DONE, "by another process"
                        board.say(job, "done by another process")
                    else:
                        job.state = WAITING
                        waiting.append(job)
            if asked:
                break
        if asked:
            _stop(running, launcher, asked)


def _handle_outcome(job: Job, outcome: Outcome, board: Board, retries: int) -> None:
    """Set a job's state by the outcome of an attempt, and report it."""
    job.seconds, job.reason = time.time() - job.began, outcome.reason
    if outcome.status == "done":
        job.state = DONE
        record = records.read(job.config.results, job.identity)
        assert record is not None
        for other in board.jobs:  # unpredicted runs of the same row: as long as this one
            if other.key == job.key and other.device_seconds is None:
                other.device_seconds = record["host"]["seconds"] * job.devices
        shown = "  ".join(f"{kind} {records.headline(values)}" for kind, values in record["final"].items())
        board.say(job, f"done in {duration(job.seconds)}, {shown}")
    elif outcome.status == "busy":
        _mark_elsewhere(job, holder(job.config.runs, job.identity) or "it has just left", board)
    elif outcome.status == "refused":
        job.state = REFUSED
        board.say(job, f"refused: {outcome.reason}")
    elif outcome.status == "diverged":
        job.state = FAILED
        board.say(job, f"failed: {outcome.reason}")
    elif job.attempts <= retries:
        job.state = WAITING
        board.say(job, f"{outcome.reason}; once more, from its last checkpoint ({job.folder / LOG})")
    else:
        job.state = FAILED
        if outcome.status == "failed":
            write_failed(job.config, outcome.reason)
        board.say(job, f"failed: {outcome.reason}")


def _mark_elsewhere(job: Job, who: str, board: Board) -> Job:
    """Note that another process works on a run, which the loop then checks from time to time."""
    if job.state != ELSEWHERE:
        job.state, job.reason = ELSEWHERE, who
        board.say(job, f"another process has it ({who}), waiting for it")
    job.attempts = max(0, job.attempts - 1)
    return job


def _stop(running: dict[str, Job], launcher: Launcher, asked: list[int]) -> None:
    """Ask the runs to save and stop; kill them at a second signal or after STOP_SECONDS. Then raise KeyboardInterrupt
    or Stopped, by the first signal."""
    print(f"stopping: {len(running)} runs save themselves; once more ends them at once", file=sys.stderr)
    launcher.ask_to_stop()
    until = time.monotonic() + STOP_SECONDS
    while running and len(asked) == 1 and time.monotonic() < until:
        for identity, _ in launcher.ended(0.5):
            running.pop(identity)
    if running:
        launcher.kill()
    raise KeyboardInterrupt if asked[0] == signal.SIGINT else Stopped(asked[0])


def _conclude(jobs: list[Job]) -> int:
    """List the failed runs, with the ends of their logs; return the exit code. UserError: all runs were refused."""
    refused = [job for job in jobs if job.state == REFUSED]
    failed = [job for job in jobs if job.state == FAILED]
    for job in failed:
        print(f"{job.identity} {job.key} seed {job.config.seed}: {job.reason}", file=sys.stderr)
        print(*(f"    {line}" for line in _tail(job.folder / LOG)), sep="\n", file=sys.stderr)
        print(f"    ({job.folder / LOG}, {job.attempts} attempts)", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again", file=sys.stderr)
    if refused:
        reasons = list(dict.fromkeys(job.reason for job in refused))
        message = f"{len(refused)} of {len(jobs)} runs cannot be run: {'; '.join(reasons)}"
        if len(refused) == len(jobs):
            raise UserError(message)
        print(message, file=sys.stderr)
    return 1 if failed or refused else 0


def _tail(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


def _announce(experiment: Experiment, jobs: list[Job], missing: list[Job], list_all: bool) -> None:
    """Print how many runs are missing, and the time they should take, predicted from recorded runs."""
    print(f"{experiment.card.name}: {experiment.card.title}", file=sys.stderr)
    todo = {job.identity for job in missing}
    for job in jobs if list_all else []:
        state = "to run" if job.identity in todo else "done"
        if job.identity in todo:
            state += "" if job.predicted is None else f", about {duration(job.predicted)}"
            state += f" on {job.devices} devices" if job.devices > 1 else ""
            state += ", time not measured" if job.predicted is None else ""
        where = f"{job.key:18} {batches(job.config.result()):9} seed {job.config.seed}"
        print(f"  {job.identity}  {where}  {state}", file=sys.stderr)
    seconds = sum(job.device_seconds for job in missing if job.device_seconds is not None)
    unknown = sum(job.device_seconds is None for job in missing)
    parts = [f"{len(missing)} of {len(jobs)} runs to do"]
    if seconds:
        parts.append(f"about {duration(seconds)} on one device ({seconds / 3600:.2f} device-hours)")
    if unknown:
        parts.append(f"device-hours not measured for {unknown} of them: no record of their kind")
    print(", ".join(parts), file=sys.stderr)


def _devices(config: Config, asked: int) -> int:
    """Return the largest number of devices, up to `asked`, to which the statistics groups can be dealt out. UserError:
    as check_batches."""
    for devices in range(asked, 1, -1):
        try:
            check_batches(config, devices)
            return devices
        except UserError:
            continue
    check_batches(config, 1)
    return 1


def _check_data(jobs: list[Job]) -> None:
    """Raise UserError if data are missing: else a job that Slurm queues would only say so days later."""
    from kalmannorm import data
    from kalmannorm.data.scenes import find

    folders = {(job.config.data, job.config.dataset.name): job.config for job in jobs}
    for config in folders.values():
        root, dataset = data.root(config.data), config.dataset
        if isinstance(dataset, CocoDataset):
            from kalmannorm.data import coco

            coco.find(dataset.name, root)
        elif isinstance(dataset, FilesDataset):
            if dataset.values().get("loader") != "ffcv":
                data.folder.find(root, dataset.values())
        elif scenes := data.SCENES.get(dataset.name):
            for split in ("train", "test"):
                find(dataset.name, scenes, root / scenes.folder, split)
        elif dataset.name != "digits" and not (root / data.VARIANTS.get(dataset.name, dataset.name)).exists():
            data.load(dataset.name, root)  # raises an error that says what to do


def _make_paths_absolute(jobs: list[Job]) -> None:
    """Make paths absolute: other machines share the file system, but start in other folders."""
    from kalmannorm import data

    for job in jobs:
        config = job.config
        weights = config.weights and str(Path(config.weights).expanduser().absolute())
        results, runs = (str(Path(place).absolute()) for place in (config.results, config.runs))
        root = str(data.root(config.data).absolute())
        job.config = replace(config, data=root, results=results, runs=runs, weights=weights)
        job.folder = Path(runs) / job.identity


def _launcher(options: Options, config: Config, runs: int) -> Launcher:
    if options.launcher == "ray":
        from kalmannorm.runs.ray import OnRay

        return OnRay(options, config.device)
    if options.launcher == "slurm":
        from kalmannorm.runs.slurm import OnSlurm

        return OnSlurm(options, config.device, config.runs)
    from kalmannorm.runs.pool import Local

    return Local(options, config.device, runs)
