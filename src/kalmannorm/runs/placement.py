"""Parse the arguments that say where a sweep's runs execute. They are not overrides, and not part of a run."""

from dataclasses import dataclass, field
from typing import Any

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.composition import refuse_repeated

LAUNCHERS = ("local", "ray", "slurm")
HELP = """where the runs execute, beside overrides:
  launcher=local   processes of this machine (the default), each of which lives on from run to run
  launcher=ray     a Ray cluster: address=HOST:PORT or $RAY_ADDRESS, else one on this machine
  launcher=slurm   an array job: slurm.partition=NAME slurm.time=MINUTES, any parameter of submitit's
  gpus=N           of them (local: the first N, or gpus=0,2 for these; without it all that are visible, which
                   are those of CUDA_VISIBLE_DEVICES where it is set); implies device=cuda
  per_gpu=N        runs at once on each GPU (1)
  slots=N          runs at once on CPUs (one a core, up to 4); threads=N: of each (the cores, divided among them)
  devices=N        of each run, at most (on GPUs the card's, else 1): as many as its statistics groups can be dealt to
  retries=N        of a run whose process died or raised an error (1)"""


@dataclass(frozen=True)
class Options:
    launcher: str = "local"
    gpus: tuple[str, ...] | int | None = None  # ids, or their number
    per_gpu: int = 1
    slots: int | None = None
    threads: int | None = None
    devices: int | None = None
    retries: int = 1
    address: str | None = None
    slurm: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu_count(self) -> int | None:
        return len(self.gpus) if isinstance(self.gpus, tuple) else self.gpus


def split(arguments: list[str]) -> tuple[Options, list[str]]:
    """Return the options among `arguments`, and the other arguments. UserError: an invalid value.

    Asking for GPUs adds device=cuda: the machine that composes the runs may have none, such as a cluster's login node.
    """
    refuse_repeated(arguments)
    own: dict[str, Any] = {"slurm": {}}
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("per_gpu", "slots", "threads", "devices", "retries"):
            own[key] = _number(key, value, least=0 if key == "retries" else 1)
        elif key == "gpus":
            named = tuple(part.strip() for part in value.split(",") if part.strip())
            own[key] = named if "," in value or value.startswith("GPU-") else _number(key, value, least=1)
        elif key in ("launcher", "address"):
            own[key] = value
        elif key.startswith("slurm."):
            own["slurm"][key.removeprefix("slurm.")] = int(value) if value.isdigit() else value
        else:
            rest.append(argument)
    options = Options(**own)
    if options.launcher not in LAUNCHERS:
        raise UserError(nearest(options.launcher, LAUNCHERS, "launcher"))
    for key, launcher in (("address", "ray"), ("slurm", "slurm")):
        if own.get(key) and options.launcher != launcher:
            raise UserError(f"{key} belongs to launcher={launcher}, not to launcher={options.launcher}")
    if options.launcher != "local" and isinstance(options.gpus, tuple):
        raise UserError(f"gpus={','.join(options.gpus)}: launcher={options.launcher} chooses them, pass their number")
    if options.gpus is not None and not any(argument.startswith("device=") for argument in rest):
        rest.append("device=cuda")
    return options, rest


def _number(key: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise UserError(f"{key}={text}: expected a whole number from {least}")
    return int(text)
