"""Sweeps in tests: processes of faulty.py, and what they left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import faulty
from trainings import SMALL

TABLE7 = ["table7", *SMALL, "rows=bn_stat2,kn_stat2"]


def started(file: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(faulty.HERE), str(file), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def statuses(folder: Path) -> dict[str, str]:
    files = (folder / "results" / "records").glob("*.json")
    return {file.stem: json.loads(file.read_text())["status"] for file in files}


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
