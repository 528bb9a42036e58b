"""What this machine has; all but `host` asked without torch, which takes seconds to import."""

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
from typing_extensions import TypedDict  # of which the records' schema is made: Python's own does from 3.12 on

from kalmannorm.errors import UserError

CPUS = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
# What torchrun sets for each process, and what any other launcher has to set.
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def cores() -> int:
    """Count the cores that this process may use, by its affinity and its container's quota."""
    from joblib import cpu_count  # half a second

    count: int = cpu_count()
    return count


def has_gpu() -> bool:
    """Say whether there is a driver, and CUDA_VISIBLE_DEVICES does not hide all its GPUs."""
    return DRIVER.exists() and allotted_gpus() != ()


def allotted_gpus() -> tuple[str, ...] | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by number or UUID, as CUDA reads it; None where it is not set.

    A cluster sets it to what it allots to a job. What follows a number below 0 or a word like "none" is not seen.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return None
    names = [part.strip() for part in chosen.split(",")]
    valid = itertools.takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names)
    return tuple(dict.fromkeys(valid))


@functools.cache
def multiplies_bfloat16() -> bool:
    """Say whether the CPU has instructions for products of bfloat16 matrices."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_of_cpu("flags").split())


def has_compiler() -> bool:
    """Say whether there is the C++ compiler that torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is asked for next, where it is glibc.

    Else it hands a backward's feature maps back to the system, and the next step takes a page fault for each 4 kB of
    them: up to a tenth of an eager step on a CPU, and more for the model that frees larger pieces. The process is as
    large as it was at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def _of_cpu(what: str) -> str:
    """Return what Linux says of the first processor; nothing elsewhere."""
    try:
        lines = CPUS.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def visible_gpus() -> tuple[str, ...]:
    """Return the ids of this machine's GPUs, those of CUDA_VISIBLE_DEVICES if it is set."""
    if (chosen := allotted_gpus()) is not None:
        return chosen
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ("0",) if DRIVER.exists() else ()
    return tuple(str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")) or ("0",)


@dataclass(frozen=True)
class Launch:
    """Which process of how many this is: of the run, and of those on this machine (torchrun's LOCAL_...)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def launch() -> Launch:
    """Read what a launcher such as torchrun has set. UserError: part of it, as an earlier shell or a pod leaves it."""
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


# Finite, from 0 on; a record's schema checks it.
Measured = Annotated[float, Field(ge=0, lt=math.inf)]


class Host(TypedDict, total=False):
    """Time and place of a run: all that may differ between two records of it."""

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
    """Return what is known of it before the run."""
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


@functools.cache  # what this process imported, not what the checkout holds when a long sweep ends
def _git() -> Commit:
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else another's, in whose folder this one is installed
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
