"""Find out what this machine has. Only `host` imports torch, which takes seconds."""

import ctypes
import functools
import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict  # for the records' schema: pydantic takes Python's own from 3.12 on

from kalmannorm.errors import UserError

CPUS = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
# Variables that torchrun sets for each process, and any other launcher has to set.
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its container's quota."""
    from joblib import cpu_count  # importing it takes half a second

    count: int = cpu_count()
    return count


def has_gpu() -> bool:
    """Say whether there is an NVIDIA driver whose GPUs CUDA_VISIBLE_DEVICES does not all hide."""
    return DRIVER.exists() and allotted_gpus() != ()


def allotted_gpus() -> tuple[str, ...] | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by number or UUID, as CUDA reads it; None where it is not set.

    A cluster sets it to the GPUs of a job. Like CUDA, this ignores all that follows a negative number or other word.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return None
    names = [part.strip() for part in chosen.split(",")]
    valid = itertools.takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names)
    return tuple(dict.fromkeys(valid))


@functools.cache
def multiplies_bfloat16() -> bool:
    """Say whether the CPU has instructions for products of bfloat16 matrices; False outside of Linux."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_of_cpu("flags").split())


def has_compiler() -> bool:
    """Say whether the C++ compiler is installed that torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations; other C libraries are left alone.

    By default glibc returns the feature maps to the system after the backward, and the next step takes a page fault for
    each 4 kB of them: up to a tenth of an eager step on a CPU, more for a model that frees larger pieces. The cost: the
    process keeps the size of its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def _of_cpu(what: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, "" if there is none."""
    try:
        lines = CPUS.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def visible_gpus() -> tuple[str, ...]:
    """Return the ids of this machine's GPUs, those in CUDA_VISIBLE_DEVICES if it is set."""
    if (chosen := allotted_gpus()) is not None:
        return chosen
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ("0",) if DRIVER.exists() else ()
    return tuple(str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")) or ("0",)


@dataclass(frozen=True)
class Launch:
    """This process's rank and the number of processes: in the whole run, and on this machine (local_...)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def launch() -> Launch:
    """Read the variables of a launcher such as torchrun. UserError: only some are set, as an earlier shell leaves them;
    a bad value."""
    given = {name: value for name in LAUNCHER if (value := os.environ.get(name, "").strip())}
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    remedy = f"start with torchrun --nproc-per-node N -m kalmannorm train ..., or `unset {' '.join(LAUNCHER)}`"
    for name in LAUNCHER[:4]:
        if not ((number := given.get(name, "0")).isascii() and number.isdecimal()):
            raise UserError(f"{name}={given[name]} in the environment: expected a number; {remedy}")
    world, rank, local_rank, local_world = (int(given.get(name, "0")) for name in LAUNCHER[:4])
    if world < 2 and not rank:
        return Launch()
    if missing := [name for name in (*LAUNCHER[:3], *LAUNCHER[4:]) if name not in given]:
        raise UserError(f"{shown} in the environment without {', '.join(missing)}: {remedy}")
    if rank >= world:
        raise UserError(f"{shown} in the environment: expected RANK from 0 to {world - 1}; {remedy}")
    return Launch(rank, world, local_rank, local_world or world)


class Commit(TypedDict):
    """The commit of the source, and whether tracked files differ from it; nulls outside a checkout."""

    commit: str | None
    dirty: bool | None


# Finite and not negative, as a record's schema checks.
Measured = Annotated[float, Field(ge=0, lt=math.inf)]


class Host(TypedDict, total=False):
    """Time, machine and speed of a run: the only part in which two records of it may differ."""

    started: str  # ISO 8601, UTC
    device: str
    hardware: str
    threads: Annotated[int, Field(ge=1)]
    git: Commit
    versions: dict[str, str | None]
    processes: Annotated[int, Field(ge=1)]
    images_per_s: Measured | None
    seconds: Measured  # of the last process
    train_seconds: Measured  # of all processes that worked on the run


def host(device: str) -> Host:
    """Return the part of Host that is known before the run. Imports torch."""
    import torch

    on_gpu = device.startswith("cuda")
    processor = _of_cpu("model name") or platform.processor() or "unknown processor"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {processor}",
        "threads": torch.get_num_threads(),
        "git": _git(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "numpy", "kalmannorm")}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache  # the commit at the import, also if the checkout changes during a long sweep
def _git() -> Commit:
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        # Without a lock on the index: the user's commits would fail meanwhile, and if this is killed from then on.
        line = ["git", "--no-optional-locks", *words]
        return subprocess.run(line, cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails in another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
