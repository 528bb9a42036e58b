"""A real training process, killed again and again at random moments, ends in the numbers of one that was left alone."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from kalmannorm.train import checkpoint

pytestmark = pytest.mark.slow

KILLS = 20
SMALL = [
    "dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu", "budget.subset=512", "budget.epochs=8",
]  # fmt: skip


def job(folder: str, extra: list[str]) -> None:
    """The body of the training process. Saving takes longer than it would, so that kills fall into it."""
    import os

    from kalmannorm.cli import main

    fsync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.02), fsync(handle))[1]
    torch.set_num_threads(1)
    raise SystemExit(main(["train", *SMALL, *extra, f"results={folder}/results", f"runs={folder}/runs"]))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that do not each wait for torch: forked off a server that has imported it, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kalmannorm.train.run", "tensorboard.compat.proto.event_pb2", "sklearn.datasets"])
    return context


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


@pytest.mark.parametrize("extra", [["norm=bn"], ["norm=bkn"], ["norm=bkn", "norm.predictor=sampling"]])
def test_killed_twenty_times_and_still_the_same_numbers(tmp_path, processes, extra):
    alone = processes.Process(target=job, args=(str(tmp_path / "alone"), extra))
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
            process = processes.Process(target=job, args=(str(folder), extra))
            left = unfinished(folder)
            process.start()
            process.join(rng.uniform(0, whole) if kills < KILLS else None)
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
