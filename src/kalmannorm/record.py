"""Run records: results/records/<id>.json, and beside it <id>.npz with the small arrays that figures draw.

Tables read records and nothing else. A record is written whole or not at all, the JSON last.
"""

import functools
import hashlib
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.config import Config, result_part
from kalmannorm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# Raised when a change alters results: records of another number are listed as stale and never tabulated.
NUMERICS = 2


def run_id(config: Config, numerics: int | None = None) -> str:
    """Hash of what determines the result: 12 hexadecimal digits. `numerics`: another version's than this."""
    text = json.dumps({"numerics": NUMERICS if numerics is None else numerics, **result_part(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def path(results: str | Path, identity: str) -> Path:
    return Path(results) / "records" / f"{identity}.json"


def read(results: str | Path, identity: str) -> dict[str, Any] | None:
    """The record of a run, None where there is none. UserError: a file that is not a record."""
    file = path(results, identity)
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        if record["id"] != identity or record["status"] not in ("done", "failed"):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a whole run record: move it away, or delete it to run again") from None
    return record


def is_done(results: str | Path, identity: str) -> bool:
    record = read(results, identity)
    return record is not None and record["status"] == "done"


def write(results: str | Path, record: dict[str, Any], arrays: "dict[str, np.ndarray] | None" = None) -> Path:
    """Writes the arrays, then the record; both by a temporary file and a rename."""
    file = path(results, record["id"])
    if arrays:
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(file.with_suffix(".npz"), buffer.getvalue())
    write_atomically(file, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return file


def check_writable(folder: Path) -> None:
    """UserError where no files can be written to the folder, or to where it is to be made: before days of training."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name another by results= or runs=") from None


def write_atomically(file: Path, content: bytes) -> None:
    """Whole or not at all, also after a power cut. UserError: no permission, no space."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(file)
            _sync(file.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None


def _sync(folder: Path) -> None:
    """The renaming itself. What is renamed is whole in any case, and some file systems cannot do that to a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def begin(config: Config, parameters: int, data: dict[str, Any], device: str, processes: int) -> dict[str, Any]:
    """A record of what is known of a run before it trains. `parameters`: how many; `data`: provenance and sizes."""
    return {
        "id": run_id(config),
        "numerics": NUMERICS,
        "status": "done",
        "reason": None,
        "config": result_part(config),
        "parameters": parameters,
        "data": data,
        "host": host(device) | {"processes": processes},
    }


def add_speed(record: dict[str, Any], images: int, train_seconds: float, seconds: float) -> None:
    """`images` that were trained on in `train_seconds`, of all the processes of the run; `seconds`: of this one, with
    evaluation."""
    record["host"] |= {
        "seconds": round(seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "images_per_s": round(images / train_seconds, 2) if train_seconds else None,
    }


def headline(values: Mapping[str, Any]) -> str:
    """What a run reached under one kind of statistics, with its unit."""
    return f"{reached(values)} %" if "accuracy" in values else f"box / mask AP {reached(values)}"


def reached(values: Mapping[str, Any]) -> str:
    """Its number: accuracy in percent, a detector's "box / mask" AP; "-" for one that pycocotools does not give."""
    if "accuracy" in values:
        return f"{values['accuracy']:.2f}"
    found = (values.get(key) for key in ("box_ap", "mask_ap"))
    return " / ".join("-" if value is None else f"{value:.2f}" for value in found)


def host(device: str) -> dict[str, Any]:
    """Time and place of a run: all that may differ between two records of it."""
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
