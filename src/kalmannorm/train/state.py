"""All that training changes, in one place: what a checkpoint holds, and the signals that ask for one."""

import random
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.errors import Stopped
from kalmannorm.train import checkpoint
from kalmannorm.train.ranks import Ranks

# One value an epoch each; accuracies in percent, of training (augmented) and of the test set under two statistics.
CURVES = ("epoch", "step", "lr", "train_loss", "train_accuracy", "moving", "online")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send ahead of taking the machine away


@dataclass
class Session:
    """A training under way. The next step is number `step` of epoch `epoch`, both from 0; sums are of that epoch."""

    identity: str
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of training, without evaluation, over all processes that worked on the run
    loss_sum: Tensor = field(init=False)
    correct: Tensor = field(init=False)
    curves: dict[str, list[Any]] = field(default_factory=lambda: {key: [] for key in CURVES})

    def __post_init__(self) -> None:
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.loss_sum = torch.zeros((), device=self.ranks.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.ranks.device)

    def means(self, batch: int) -> tuple[float, float]:
        """Loss and training accuracy (percent) over the epoch's steps of `batch` images so far, over all ranks."""
        loss_sum, correct = self.ranks.sum(self.loss_sum, self.correct)
        return loss_sum.item() / (self.step * self.ranks.world), 100 * correct.item() / (self.step * batch)

    def save(self) -> None:
        """Rank 0 writes; each rank's sums and random generators go with it."""
        # On the CPU: rank 0 must not open every other rank's GPU to unpack what it sends.
        sums = {"loss_sum": self.loss_sum.cpu(), "correct": self.correct.cpu()}
        own = {"random": _random_state(self.ranks.device), **sums}
        of_ranks = self.ranks.gather(own)
        if not self.ranks.main:
            return
        checkpoint.save(
            self.folder,
            {
                "id": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ranks": of_ranks,
                "epoch": self.epoch,
                "step": self.step,
                "seconds": self.seconds,
                "curves": self.curves,
            },
        )

    def restore(self) -> None:
        """Go back to the last good checkpoint, if there is one; the number of processes may differ from then."""
        main = self.ranks.main
        state = self.ranks.from_main(checkpoint.load(self.folder, self.identity, self._check) if main else None)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        device, saved = self.ranks.device, state["ranks"]
        if len(saved) == self.ranks.world:
            own = saved[self.ranks.rank]
            _set_random_state(own["random"], device)
            self.loss_sum, self.correct = own["loss_sum"].to(device), own["correct"].to(device)
        else:
            # As many sums as there were ranks: their mean loss on every rank, all that was correct on the first.
            self.loss_sum = torch.stack([own["loss_sum"].cpu() for own in saved]).mean(0).to(device)
            correct = torch.stack([own["correct"].cpu() for own in saved]).sum()
            self.correct = (correct if self.ranks.main else torch.zeros_like(correct)).to(device)
        self.curves.update(state["curves"])

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a checkpoint is of this network and optimizer; before anything of it is taken."""
        model, own = state["model"], self.model.state_dict()
        if odd := sorted(model.keys() ^ own.keys()):
            raise ValueError(f"it is of another network: {len(odd)} entries are not in both, the first {odd[0]}")
        for name, value in own.items():
            if (model[name].shape, model[name].dtype) != (value.shape, value.dtype):
                raise ValueError(f"it is of another network: {name} is {list(model[name].shape)}")
        groups, saved = self.optimizer.param_groups, state["optimizer"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
            raise ValueError("it is of another optimizer")
        parameters = [p for group in groups for p in group["params"]]
        for number, values in saved["state"].items():
            for value in values.values():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameters[number].shape:
                    raise ValueError(f"it is of another optimizer: momentum {number} is {list(value.shape)}")


def _random_state(device: torch.device) -> dict[str, Any]:
    """Of every generator in the process. Training draws from generators keyed by (seed, epoch) and needs none of them,
    but a model or data set of one's own may."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002


class StopRequest:
    """While it lasts, SIGTERM and SIGUSR1 are noted and do not end the process; `check` raises Stopped after a step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def asked(self) -> bool:
        """Whether any rank was asked to stop; they all hear the same, at the same step."""
        self.number = self.ranks.any(self.number)
        return self.number is not None

    def check(self) -> None:
        if self.asked():
            assert self.number is not None
            raise Stopped(self.number)
