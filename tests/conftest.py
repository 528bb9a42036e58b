"""One thread per test process: the tests' tensors are small, and threads that wait for each other cost more.

And one arithmetic on every machine: ids hang on what `precision=auto` and `compile=auto` stand for.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def a_cpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmannorm.machine.multiplies_bfloat16", lambda: False)
