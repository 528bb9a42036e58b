"""The state of a training: all that its steps change, which is what a checkpoint holds."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.experiments.record import Curves
from kalmannorm.train import checkpoint
from kalmannorm.train.ranks import Ranks


@dataclass
class Session:
    """The state of a training. The next step is number `step` of epoch `epoch`, both from 0.

    `curves`: lists with one value per epoch. `sums`: this process's share of the sums over the epoch's steps so far,
    which begin as `zero_sums()`.
    """

    identity: str
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    zero_sums: Callable[[], dict[str, Tensor]]
    curves: Curves
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of training, without evaluation, over all processes that worked on the run
    sums: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.begin_epoch(0)

    @property
    def fresh(self) -> bool:
        """Whether no step was done yet."""
        return self.epoch == self.step == 0

    def begin_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, with sums of zero."""
        self.epoch, self.step, self.sums = epoch, 0, self.zero_sums()

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's values to the sums."""
        for key, value in sums.items():
            self.sums[key] += value

    def totals(self) -> dict[str, Tensor]:
        """Return the sums over all processes."""
        return dict(zip(self.sums, self.ranks.sum(*self.sums.values()), strict=True))

    def save(self) -> None:
        """Write a checkpoint with every rank's sums and random states. All ranks call this; rank 0 writes."""
        # On the CPU, else rank 0 would open every other rank's GPU to unpickle the tensors it is sent.
        sums = {key: value.cpu() for key, value in self.sums.items()}
        own = {"random": _random_state(self.ranks.device), "sums": sums}
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
        """Load the last good checkpoint, if there is one; it may come from another number of processes."""
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
            self.sums = {key: value.to(device) for key, value in own["sums"].items()}
        elif self.ranks.main:  # another number of processes saved it: rank 0 takes all of their sums
            for own in saved:
                self.add({key: value.to(device) for key, value in own["sums"].items()})
        self.curves.update(state["curves"])

    def _check(self, state: checkpoint.State) -> None:
        """Raise ValueError unless a checkpoint fits this network and optimizer. Nothing is loaded from it yet."""
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
    """Return the state of every global random generator. Training itself does not need them, as it draws from
    generators keyed by (seed, epoch), but a user's model or data set may."""
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
