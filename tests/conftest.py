"""One thread per test process: the tests' tensors are small, and threads that wait for each other cost more.

And one arithmetic on every machine: ids hang on what `precision=auto` and `compile=auto` stand for.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import faulty
import pytest

from kalmannorm.runs import worker

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def a_cpu_without_bfloat16_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmannorm.machine.multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("kalmannorm.machine.has_compiler", lambda: False)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[str]]], Path]:
    """Writes a plan (faulty.py) and returns its file; worker processes of this process follow it."""

    def write(actions: dict[str, list[str]]) -> Path:
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(actions))
        monkeypatch.setattr(worker, "COMMAND", faulty.worker_command(file))
        return file

    return write
