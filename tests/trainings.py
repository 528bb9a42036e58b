"""Real trainings in tests: where they write, what they left, and the same on several processes."""

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kalmannorm import data
from kalmannorm.experiments.config import compose
from kalmannorm.models import LAST_NORMALIZERS, inception_cifar
from kalmannorm.train import checkpoint, loop

SMALL = ["dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu", "precision=fp32"]
# Also in processes of their own, which know nothing of conftest.
SPREAD = [*SMALL, "compile=false", "batch.grad_batch=16", "budget.subset=48", "checkpoint_every=1"]
TESTED = 42  # images: no whole number of pairs for each of two processes, nor of groups of 16
Runs = dict[str, list[str]]  # name -> overrides
# Processes that do not each wait for torch: forked off a server that has imported it, and computed nothing.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["kalmannorm.train.run", "kalmannorm.train.task_classification", "torch._dynamo", "torchvision",
     "tensorboard.compat.proto.event_pb2", "sklearn.datasets"]
)  # fmt: skip


@contextmanager
def small_digits() -> Iterator[None]:
    """Let this process train one Inception block and test it on 42 images: most tests ask nothing of the others."""
    digits = data.digits.load()
    few = replace(digits, test_images=digits.test_images[:TESTED], test_labels=digits.test_labels[:TESTED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.digits, "load", lambda: few)
        patch.setattr(inception_cifar, "FILTERS", inception_cifar.FILTERS[:1])
        last = tuple(name.replace("blocks.2", "blocks.0") for name in LAST_NORMALIZERS["inception_cifar"])
        patch.setitem(LAST_NORMALIZERS, "inception_cifar", last)
        yield


def place(folder: Path, root: Path | None = None) -> list[str]:
    """Where a run writes, and reads if its data set is not bundled."""
    return [*([f"data={root}"] if root else []), f"results={folder / 'results'}", f"runs={folder / 'runs'}"]


def last_of_each(overrides: list[str]) -> list[str]:
    """The later one of two of the same setting."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def only_record(folder: Path) -> dict:
    (file,) = (folder / "results" / "records").glob("*.json")
    return json.loads(file.read_text())


def outcome(folder: Path) -> tuple[dict, dict]:
    """The one record, and the state that its run ended in."""
    record = only_record(folder)
    return record, checkpoint.load(folder / "runs" / record["id"], record["id"])


def comparable(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "host"}


def assert_same_run(a: Path, b: Path) -> None:
    """Records equal but for time and host, weights bitwise."""
    (first, state), (second, other) = outcome(a), outcome(b)
    assert comparable(first) == comparable(second)
    assert all(torch.equal(state["model"][key], other["model"][key]) for key in state["model"] if "extra" not in key)


def signal_in_steps(monkeypatch: pytest.MonkeyPatch, number: int, *at: int) -> list[int]:
    """Raise a signal in the optimizer's steps of these numbers, from 1; return a list that grows by every step."""
    steps: list[int] = []
    stepped = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        steps.append(1)
        if len(steps) in at:
            signal.raise_signal(number)
        return stepped(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    return steps


def run_all(folder: Path, runs: Runs) -> None:
    """Every run in its own folder, in this process or, where a process group is up, as one of its ranks."""
    with small_digits():
        for name, overrides in runs.items():
            loop.run(compose([*overrides, *place(folder / name)]))


def fork(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Call function(number, *arguments) in each of the processes, and wait for them."""
    mp.start_processes(function, arguments, nprocs=processes, start_method="forkserver")


def on_processes(world: int, folder: Path, runs: Runs) -> None:
    """Every run on `world` processes, which are started once for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork(_rank, (world, port, folder, runs), world)


def _rank(rank: int, world: int, port: int, folder: Path, runs: Runs) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    run_all(folder, runs)
    dist.destroy_process_group()


def differences(one: Path, other: Path) -> dict[str, float]:
    """Largest differences, of weights and moving statistics relative to the largest entry of each tensor."""
    (a, state_a), (b, state_b) = outcome(one), outcome(other)
    assert a["id"] == b["id"] and a["curves"].keys() == b["curves"].keys()

    def largest(keys: list[str]) -> float:
        found = []
        for key in keys:
            x, y = state_a["model"][key].double(), state_b["model"][key].double()
            found.append(((x - y).abs().max() / x.abs().max().clamp_min(1e-3)).item())
        return max(found, default=0.0)

    keys = [key for key, value in state_a["model"].items() if isinstance(value, torch.Tensor) and value.numel()]
    momenta = [
        (
            (x["momentum_buffer"] - y["momentum_buffer"]).abs().max() / x["momentum_buffer"].abs().max().clamp_min(1e-3)
        ).item()
        for x, y in zip(state_a["optimizer"]["state"].values(), state_b["optimizer"]["state"].values(), strict=True)
    ]
    accuracies = [abs(a["final"][kind]["accuracy"] - b["final"][kind]["accuracy"]) for kind in a["final"]]
    return {
        "loss": max(abs(x - y) for x, y in zip(a["curves"]["train_loss"], b["curves"]["train_loss"], strict=True)),
        "gradients": max(momenta),
        "moving": largest([key for key in keys if "running" in key]),
        "weights": largest([key for key in keys if "running" not in key]),
        "accuracy": max(accuracies),
    }


def equal(name: str, one: Path, other: Path, images: int) -> bool:
    found = differences(one / name, other / name)
    print(f"{name:18}", "  ".join(f"{key} {value:.1e}" for key, value in found.items()))
    for folder in (one, other):
        assert outcome(folder / name)[0]["final"]["online"]["images"] == images
    return (
        found["loss"] < 1e-5 and found["moving"] < 1e-3 and found["weights"] < 1e-3
        and found["gradients"] < 1e-2 and found["accuracy"] <= 100 / images * 1.01
    )  # fmt: skip


def assert_same(
    folder: Path,
    runs: Runs,
    other: Callable[[Path, Runs], None],
    one_process: Path | None = None,
    images: int = TESTED,
) -> None:
    """What `other` makes of the runs is what one process makes of them (and has made, in the folder given, at seed 1).

    By rounding, a ReLU's input may fall to the other side of 0, and one pixel's gradient with it: about one small run
    in twenty, another on every processor, and never in float64. So a case that differs has two more seeds.
    """
    for seed in (1, 2, 3):
        print()
        seeded = {name: [*run, f"seed={seed}"] for name, run in runs.items()}
        first = one_process if seed == 1 else None
        if first is None:
            run_all(first := folder / f"one-{seed}", seeded)
        other(folder / f"other-{seed}", seeded)
        runs = {name: run for name, run in runs.items() if not equal(name, first, folder / f"other-{seed}", images)}
        if not runs:
            return
    raise AssertionError(f"{', '.join(runs)}: not what one process computes, at three seeds")
