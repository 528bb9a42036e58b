"""What this machine has, asked without torch, which takes seconds to import."""

import functools
import os
import subprocess
from pathlib import Path

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
