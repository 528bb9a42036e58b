"""launcher=local: a pool of worker processes on this machine, one for every slot."""

import itertools
import os
import select
from dataclasses import dataclass

from kalmannorm.errors import UserError
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import run_id
from kalmannorm.machine import cores, visible_gpus
from kalmannorm.runs.job import Outcome
from kalmannorm.runs.placement import Options
from kalmannorm.runs.worker import Worker

CPU_SLOTS = 4  # at most, where nobody says how many


@dataclass(eq=False)
class Slot:
    """Room for a run on one device: a share of a GPU, or some CPU threads (gpu None)."""

    gpu: str | None
    worker: Worker


class Local:
    """Runs on the slots of this machine. A run on k devices holds k slots, and torchrun is started in the first."""

    def __init__(self, options: Options, device: str, runs: int) -> None:
        """Make room for so many `runs`. UserError: GPUs that are not there."""
        gpus = _gpus(options, device)
        # Small networks use two runs of one thread better than one run of two; each takes memory for its data.
        places = gpus * options.per_gpu if gpus else (None,) * (options.slots or min(runs, cores(), CPU_SLOTS))
        said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # OpenMP takes a list, for nested loops
        threads = options.threads or (int(said) if said.isdecimal() else 0) or max(1, cores() // len(places))
        self.slots = [Slot(gpu, Worker(gpu, threads)) for gpu in places]
        self.running: dict[str, list[Slot]] = {}  # by run: what it holds, its worker first
        self.devices = len(gpus) or len(places)  # most that a run can have
        what = f"GPUs {', '.join(gpus)}" if gpus else device
        self.title = f"{len(places)} at once on {what}, {threads} CPU threads each"

    @property
    def parallel(self) -> int:
        return len(self.slots)

    def room(self, devices: int) -> bool:
        return len(self._free(devices)) == devices

    def start(self, config: Config, devices: int) -> None:
        slots = self._free(devices)
        self.running[run_id(config)] = slots
        gpus = None if slots[0].gpu is None or devices == 1 else ",".join(str(slot.gpu) for slot in slots)
        slots[0].worker.start(config, devices, gpus)

    def ended(self, timeout: float) -> list[tuple[str, Outcome]]:
        """Return the ids and outcomes of the runs that ended; wait `timeout` seconds for the first."""
        answers = {slots[0].worker.fileno(): run for run, slots in self.running.items()}
        readable, _, _ = select.select(list(answers), [], [], timeout)
        ended = [answers[handle] for handle in readable]
        return [(run, self.running.pop(run)[0].worker.outcome()) for run in ended]

    def ask_to_stop(self) -> None:
        for first, *_ in self.running.values():
            first.worker.ask_to_stop()

    def kill(self) -> None:
        for slot in self.slots:
            slot.worker.kill()

    def close(self) -> None:
        for slot in self.slots:
            slot.worker.close()

    def _free(self, devices: int) -> list[Slot]:
        """Return the free slots for a run: each on another GPU."""
        taken = list(itertools.chain.from_iterable(self.running.values()))
        chosen: list[Slot] = []
        for slot in self.slots:
            if slot not in taken and (slot.gpu is None or slot.gpu not in [other.gpu for other in chosen]):
                chosen.append(slot)
        return chosen[:devices]


def _gpus(options: Options, device: str) -> tuple[str, ...]:
    """Return the ids of the GPUs to use; none on a CPU. UserError: more than there are."""
    if device != "cuda":
        if options.gpus is not None:
            raise UserError(f"gpus= goes with device=cuda, not with device={device}; on CPUs pass slots=N")
        return ()
    if options.slots is not None:
        raise UserError(f"slots={options.slots} is for CPUs; with device=cuda pass gpus= and per_gpu=")
    visible, asked = visible_gpus(), options.gpus
    if isinstance(asked, tuple):
        return _chosen(asked, visible)
    if len(visible) < (asked or 1):
        what = f"gpus={asked}" if asked else "device=cuda"
        raise UserError(f"{what}: this machine shows {len(visible)}; --dry-run lists the runs all the same")
    return visible[:asked]


def _chosen(asked: tuple[str, ...], visible: tuple[str, ...]) -> tuple[str, ...]:
    """Find which of the `visible` GPUs are meant: by their ids, or else by their places from 0, as CUDA counts what
    CUDA_VISIBLE_DEVICES leaves. UserError: others, or one twice."""
    text = ",".join(asked)
    if len(set(asked)) < len(asked):
        raise UserError(f"gpus={text}: expected each GPU once; per_gpu=N puts several runs on each")
    if all(name in visible for name in asked):
        return asked
    if all(name.isdecimal() and int(name) < len(visible) for name in asked):
        return tuple(visible[int(name)] for name in asked)
    there = f"those of this machine or its allotment: {', '.join(visible)}" if visible else "GPUs, but there are none"
    raise UserError(f"gpus={text}: expected {there}")
