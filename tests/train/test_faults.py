"""Real processes, killed again and again at random moments or out of room, end in the numbers of those left alone."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainings import FORKED

from kalmannorm.cli import main
from kalmannorm.train import checkpoint

pytestmark = pytest.mark.slow

KILLS = 20
SMALL = ["dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu"]
KILLED = [*SMALL, "batch.grad_batch=32", "budget.subset=128", "budget.epochs=6"]
SHORT = [*SMALL, "budget.subset=256", "budget.epochs=3"]


def job(folder: str, extra: list[str]) -> None:
    """The body of the training process. Saving takes longer than it would, so that kills fall into it."""
    fsync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.02), fsync(handle))[1]
    torch.set_num_threads(1)
    raise SystemExit(main(["train", *KILLED, *extra, f"results={folder}/results", f"runs={folder}/runs"]))


def records_of(folder: Path) -> dict[str, dict]:
    """Records by id, without time and host."""
    found = (json.loads(file.read_text()) for file in (folder / "results" / "records").glob("*.json"))
    return {record["id"]: {key: value for key, value in record.items() if key != "host"} for record in found}


def final(folder: Path) -> tuple[dict, dict, float]:
    """Record without time and host, weights, seconds."""
    (file,) = (folder / "results" / "records").glob("*.json")
    record = json.loads(file.read_text())
    state = checkpoint.load(folder / "runs" / record["id"], record["id"])
    assert state is not None
    return {key: value for key, value in record.items() if key != "host"}, state["model"], record["host"]["seconds"]


def unfinished(folder: Path) -> set[Path]:
    """Files of saves that are under way, or were when a process died."""
    return set(folder.glob("runs/*/.checkpoint.pt.*"))


@pytest.mark.parametrize("extra", [["norm=bkn"], ["norm=bkn", "norm.predictor=sampling"]])
def test_killed_twenty_times_and_still_the_same_numbers(tmp_path, extra):
    alone = FORKED.Process(target=job, args=(str(tmp_path / "alone"), extra))
    alone.start()
    alone.join()
    assert alone.exitcode == 0
    expected, expected_weights, whole = final(tmp_path / "alone")
    rng = random.Random(0)
    kills = during_a_save = copies = 0
    while kills < KILLS:  # a copy that ends before it was killed often enough is followed by another
        copies += 1
        folder = tmp_path / f"killed-{copies}"
        while True:
            process = FORKED.Process(target=job, args=(str(folder), extra))
            left = unfinished(folder)
            process.start()
            process.join(rng.uniform(0, whole / 2) if kills < KILLS else None)
            if kills % 4 == 3:  # a quarter of them falls into a save
                while process.is_alive() and not unfinished(folder) - left:
                    time.sleep(0.001)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            during_a_save += bool(unfinished(folder) - left)
        assert process.exitcode == 0
        record, weights, _ = final(folder)
        assert record == expected
        assert weights.keys() == expected_weights.keys()
        assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)
    print(f"\n{' '.join(extra)}: {kills} kills over {copies} runs, {during_a_save} of them during a save")
    assert during_a_save >= 3


def workers_of(sweep: subprocess.Popen) -> list[int]:
    """Process ids of a sweep's workers: its children."""
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
    try:
        return [int(number) for number in children.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_a_sweep_killed_twenty_times_does_every_run_once(tmp_path):
    """The sweep itself or its worker, at random; the same command goes on until all is done."""

    def start(folder: Path) -> subprocess.Popen:
        rows = ["rows=paper", "seeds=1", f"results={folder}/results", f"runs={folder}/runs", "checkpoint_every=0.05"]
        command = [sys.executable, "-m", "kalmannorm", "sweep", "table7", *SHORT, *rows]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    began = time.monotonic()
    assert start(tmp_path / "alone").wait() == 0
    whole = time.monotonic() - began
    expected = records_of(tmp_path / "alone")
    assert len(expected) == 3
    rng = random.Random(0)
    kills = {"sweep": 0, "worker": 0}
    folder, copies = tmp_path / "killed-1", 1
    while sum(kills.values()) < KILLS:
        sweep = start(folder)
        ended = None
        while ended is None and sum(kills.values()) < KILLS:
            time.sleep(rng.uniform(0, whole / 2))
            ended = sweep.poll()
            victim = rng.choice(["sweep", "worker"])
            pids = {"sweep": [sweep.pid], "worker": workers_of(sweep)}[victim]
            if ended is None and pids:
                os.kill(pids[0], signal.SIGKILL)
                kills[victim] += 1
                if victim == "sweep":
                    ended = sweep.wait()
        if ended == 0:  # it was done before it was killed often enough
            assert records_of(folder) == expected
            copies += 1
            folder = tmp_path / f"killed-{copies}"
    sweep.wait()
    for _ in range(3):  # workers of a killed sweep save their run and leave, and may hold its lock until then
        last = start(folder)
        said = last.communicate()[1]
        if last.returncode == 0:
            break
    assert last.returncode == 0, said
    assert records_of(folder) == expected and min(kills.values()) > 2
    print(f"\n{kills} over {copies} sweeps")
    assert not list(folder.glob("runs/*/.*")) and not list(folder.glob("results/records/.*"))


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_time(tmp_path, capsys, monkeypatch):
    """Wherever runs/ is written: one line, exit code 2, and afterwards the same numbers."""
    fsync = os.fsync
    fine = [f"results={tmp_path}/fine/results", f"runs={tmp_path}/fine/runs"]
    writes: list[int] = []
    monkeypatch.setattr("os.fsync", lambda handle: writes.append(fsync(handle)))
    assert main(["train", *SHORT, *fine]) == 0
    (expected,) = records_of(tmp_path / "fine").values()
    where = [f"results={tmp_path}/results", f"runs={tmp_path}/runs"]
    for full_from in range(0, len(writes), 3):
        left = [full_from]

        def write(handle: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        monkeypatch.setattr("os.fsync", write)
        capsys.readouterr()
        code = main(["train", *SHORT, *where])
        error = capsys.readouterr().err.splitlines()
        assert code == 0 or (code == 2 and "No space left on device" in error[-1] and "Traceback" not in str(error))
    monkeypatch.setattr("os.fsync", fsync)
    assert main(["train", *SHORT, *where]) == 0
    assert list(records_of(tmp_path).values()) == [expected]
