"""What this machine has; all but `host` asked without torch, which takes seconds to import."""

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPUS = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether there is a driver, and CUDA_VISIBLE_DEVICES does not hide all its GPUs."""
    return DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 matrices."""
    try:
        flags = next(line for line in CPUS.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def visible_gpus() -> tuple[str, ...]:
    """Ids of this machine's GPUs, those of CUDA_VISIBLE_DEVICES if it is set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(part for part in chosen.split(",") if part)
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ("0",) if DRIVER.exists() else ()
    return tuple(str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")) or ("0",)


def host(device: str) -> dict[str, Any]:
    """Return time and place of a run: all that may differ between two records of it."""
    import torch

    on_gpu = device.startswith("cuda")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {_processor()}",
        "threads": torch.get_num_threads(),
        "git": _git(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "numpy", "kalmannorm")}
        | {"python": platform.python_version()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache  # what this process imported, not what the checkout holds when a long sweep ends
def _git() -> dict[str, Any]:
    """Commit of the source, and whether tracked files differ from it; nulls outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
