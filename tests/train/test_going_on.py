"""Runs that were killed, stopped, or left with a damaged checkpoint: the same command goes on to the same numbers."""

import os
import pickle
import pty
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import FORKED, SMALL, assert_same_run, only_record, place, small_digits

from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import compose
from kalmannorm.train import checkpoint, task_classification


@pytest.mark.usefixtures("small")
def test_files_that_a_killed_process_left_unfinished_go(tmp_path):
    identity = records.run_id(compose(SMALL))
    left = [tmp_path / f"results/records/.{identity}.{ending}.x" for ending in ("json", "npz")]
    left += [tmp_path / f"runs/{identity}/.{name}.x" for name in ("checkpoint.pt", "gaps.npz")]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert main(["train", *SMALL, *place(tmp_path)]) == 0
    assert only_record(tmp_path)["id"] == identity and not any(file.exists() for file in left)


def command(folder: Path, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "kalmannorm", "train", *overrides, *place(folder)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "extra",
    [["norm=bkn", "norm.predictor=sampling"],
     *(pytest.param(extra, marks=pytest.mark.slow) for extra in (
         ["norm=eigennet", "norm.options.weights.every=2", "norm.options.weights.samples=64"],
         ["norm=pn", "norm.options.gamma_decay=[images,8]"],
         ["norm=post_gwnn", "norm.options.weights.every=3", "+norm.options.weights.covariance=predicted"],
         ["norm=bkn", "norm.preset=v1", "+norm.options.input_belief=data"],
         *([f"norm={norm}"] for norm in ("bn", "bkn", "brn", "wn", "ssn", "ibn", "zca", "itern")),
         *([f"norm={kind}", "norm.options.weights.every=3", "norm.options.weights.samples=64"]
           for kind in ("wnn", "pre_gwnn"))))],
)  # fmt: skip
def test_going_on_in_mid_epoch_ends_in_the_same_numbers(tmp_path, monkeypatch, extra):
    """Stopped by a signal within the second epoch, and once more at its end, before it is evaluated."""
    four_steps = ["budget.epochs=3", "budget.subset=128", "batch.grad_batch=32", "checkpoint_every=1"]
    overrides = [*SMALL, *extra, *four_steps]
    assert main(["train", *overrides, *place(tmp_path / "whole")]) == 0
    steps = []
    stepped, evaluated = torch.optim.SGD.step, task_classification.evaluate

    def step(self, *args):
        steps.append(1)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGUSR1)
        return stepped(self, *args)

    def evaluate_once(*args):
        if len(steps) == 8:
            steps.append(1)
            signal.raise_signal(signal.SIGTERM)
        return evaluated(*args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(task_classification, "evaluate", evaluate_once)
    assert main(["train", *overrides, *place(tmp_path / "cut")]) == 128 + signal.SIGUSR1
    assert len(steps) == 6 and not (tmp_path / "cut" / "results").exists()
    assert main(["train", *overrides, *place(tmp_path / "cut")]) == 128 + signal.SIGTERM
    assert main(["train", *overrides, *place(tmp_path / "cut")]) == 0
    assert len(steps) == 3 * 4 + 1  # no step twice
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def train_small(arguments: list[str]) -> None:
    """The body of a process of its own."""
    torch.set_num_threads(1)
    with small_digits():
        raise SystemExit(main(["train", *arguments]))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_killed_process_goes_on(tmp_path, capsys):
    """SIGKILL after the first whole epoch; the same command ends in the record of an undisturbed run."""
    overrides = [*SMALL, "budget.epochs=8"]
    assert main(["train", *overrides, *place(tmp_path / "whole")]) == 0
    arguments = [*overrides, *place(tmp_path / "killed")]
    process = FORKED.Process(target=train_small, args=(arguments,))
    process.start()
    while process.is_alive() and not list(tmp_path.glob("killed/runs/*/tensorboard/*")):  # written after an epoch
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "killed" / "results").exists()
    capsys.readouterr()
    assert main(["train", *arguments]) == 0
    said = capsys.readouterr().err
    assert "epoch 1/8" not in said and "epoch 8/8" in said
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_scheduler_s_signal_saves_and_leaves(tmp_path):
    """A real process; other phases, and the other signal, are in test_stopping.py."""
    overrides = [*SMALL, "budget.epochs=100"]
    process = subprocess.Popen(command(tmp_path, overrides), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "epoch 1/100" in line:
            process.send_signal(signal.SIGUSR1)
    assert process.wait() == 128 + signal.SIGUSR1
    assert "the same command goes on" in lines[-1]
    assert checkpoint.load(next((tmp_path / "runs").iterdir()), records.run_id(compose(overrides)))["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_and_leaves_unless_nohup_ignores_it(tmp_path, ignored):
    """What it prints on the way, to a terminal that is gone, must not keep it from saving."""
    overrides = [*SMALL, "budget.epochs=100", "checkpoint_every=1"]
    master, terminal = pty.openpty()
    ignore = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    process = subprocess.Popen(
        command(tmp_path, overrides), stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=ignore
    )
    os.close(terminal)
    while process.poll() is None and not list(tmp_path.glob("runs/*/tensorboard/*")):  # written after an epoch
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    if ignored:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
    os.close(master)
    assert process.wait() == (-signal.SIGKILL if ignored else 128 + signal.SIGHUP)
    assert checkpoint.load(next((tmp_path / "runs").iterdir()), records.run_id(compose(overrides)))["epoch"] >= 1


class Evil:
    """Unpickling it makes the file that it names."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def half_written(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


STATE = dict.fromkeys(checkpoint.PARTS) | {"id": "x", "step": 0, "seconds": 0.5, "model": {"weight": torch.arange(9.0)}}


def bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))


def changed(**values: Any) -> Callable[[Path], None]:
    """The same with other values under the checksum of the old ones, or (sha256 given) under none."""

    def damage(file: Path) -> None:
        torch.save(torch.load(file, weights_only=True) | values, file)

    return damage


def flipped(file: Path) -> None:
    """One bit of a weight."""
    whole = bytearray(file.read_bytes())
    at = whole.index(torch.arange(9.0).numpy().tobytes())
    whole[at + 5] ^= 1
    file.write_bytes(whole)


DAMAGE = {
    "half-written": half_written,
    "empty": lambda file: file.write_bytes(b""),
    "foreign": lambda file: file.write_text("not a checkpoint"),
    "of something else": lambda file: torch.save([1, 2], file),
    "of another program": lambda file: torch.save({"id": "x", "weights": 1}, file),
    "of another run": changed(id="y"),
    "a flipped bit": flipped,
    "other weights": changed(model={"weight": torch.zeros(9)}),
    "other shapes": changed(model={"weight": torch.arange(9.0).view(3, 3)}),
    "a step of words": changed(step="7", sha256=None),
    "a step below 0": changed(step=-1, sha256=None),
    "a step of nan": changed(step=float("nan"), sha256=None),
    "seconds of nan": changed(seconds=float("nan"), sha256=None),
    "an archive that claims more than it has": bomb,
    "malicious": lambda file: torch.save({"id": "x", "model": Evil(file.parent / "executed")}, file),
    "malicious pickle": lambda file: file.write_bytes(pickle.dumps(Evil(file.parent / "executed"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_previous_checkpoint_stands_in_for_a_bad_one(tmp_path, capsys, damage):
    checkpoint.save(tmp_path, STATE | {"epoch": 1})
    checkpoint.save(tmp_path, STATE | {"epoch": 2})
    assert checkpoint.load(tmp_path, "x")["epoch"] == 2
    DAMAGE[damage](tmp_path / checkpoint.NAME)
    assert checkpoint.load(tmp_path, "x")["epoch"] == 1
    said = capsys.readouterr().err
    assert checkpoint.NAME in said and checkpoint.PREVIOUS in said
    assert ("belongs to run y" if damage == "of another run" else "not a usable checkpoint") in said
    assert not (tmp_path / "executed").exists()
    (tmp_path / checkpoint.PREVIOUS).unlink()
    with pytest.raises(UserError, match="delete it to start the run again"):
        checkpoint.load(tmp_path, "x")


def test_a_kill_between_the_renames_leaves_the_previous_checkpoint(tmp_path):
    checkpoint.save(tmp_path, STATE | {"epoch": 1})
    checkpoint.save(tmp_path, STATE | {"epoch": 2})
    with pytest.raises(UserError, match="belongs to run x"):
        checkpoint.load(tmp_path, "y")
    (tmp_path / checkpoint.NAME).unlink()
    assert checkpoint.load(tmp_path, "x")["epoch"] == 1
