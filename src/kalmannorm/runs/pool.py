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

CPU_SLOTS = 4  # most slots on a CPU if the user does not say how many


@dataclass(eq=False)
class Slot:
    """Room for a run on one device: a share of a GPU, or (with gpu None) some CPU threads."""

    gpu: str | None
    worker: Worker


class Local:
    """Executes runs in this machine's slots. A run on k devices takes k slots; the first one's worker starts
    torchrun."""

    def __init__(self, options: Options, device: str, runs: int) -> None:
        """Make slots. `runs`: how many runs there will be. UserError: GPUs that do not exist."""
        gpus = _gpus(options, device)
        # On small networks, two runs of one thread are faster than one run of two; but each holds the data in memory.
        places = gpus * options.per_gpu if gpus else (None,) * (options.slots or min(runs, cores(), CPU_SLOTS))
        said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # may be a list, for nested loops
        threads = options.threads or (int(said) if said.isdecimal() else 0) or max(1, cores() // len(places))
        self.slots = [Slot(gpu, Worker(gpu, threads)) for gpu in places]
        self.running: dict[str, list[Slot]] = {}  # by run: the slots it takes; the first has the worker
        self.devices = len(gpus) or len(places)  # most devices that one run can have
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
        """Return the ids and outcomes of the runs that ended; wait up to `timeout` seconds for the first."""
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
        """Return up to `devices` free slots, all on different GPUs."""
        taken = list(itertools.chain.from_iterable(self.running.values()))
        chosen: list[Slot] = []
        for slot in self.slots:
            if slot not in taken and (slot.gpu is None or slot.gpu not in [other.gpu for other in chosen]):
                chosen.append(slot)
        return chosen[:devices]


def _gpus(options: Options, device: str) -> tuple[str, ...]:
    """Return the ids of the GPUs to use; () for a CPU. UserError: more GPUs than there are, or options of the other
    kind of device."""
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
    """Return those of the `visible` GPUs that are asked for: by id, or else by position from 0, as CUDA counts the GPUs
    in CUDA_VISIBLE_DEVICES. UserError: a GPU that is not visible, or one named twice."""
    text = ",".join(asked)
    if len(set(asked)) < len(asked):
        raise UserError(f"gpus={text}: expected each GPU once; per_gpu=N puts several runs on each")
    if all(name in visible for name in asked):
        return asked
    if all(name.isdecimal() and int(name) < len(visible) for name in asked):
        return tuple(visible[int(name)] for name in asked)
    there = f"those of this machine or its allotment: {', '.join(visible)}" if visible else "GPUs, but there are none"
    raise UserError(f"gpus={text}: expected {there}")
