"""The processes of a distributed run (torchrun): who this one is, and the few things that they must agree on.

A run on k processes computes what one process does: rank r takes the images r, r + k, ... of every batch, which are
whole statistics groups (norm/groups.py); gradients are averaged, moving averages taken over the groups of all ranks.
"""

import os
import signal
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from kalmannorm import machine, stopping
from kalmannorm.errors import Stopped, UserError, reason
from kalmannorm.experiments.config import Config, check_batches

T = TypeVar("T")

# Rank 0 alone re-estimates precise statistics and measures gaps while the others wait.
PATIENCE = timedelta(hours=2)
MEETING = timedelta(minutes=2)  # that processes get to find each other where torchrun has not brought them together


class Ranks:
    """rank, world and device of this process; collectives that do nothing where there is one process."""

    def __init__(self, config: Config) -> None:
        """Meet the other processes. UserError: a device that is not there; batches that do not divide among them."""
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; before CUDA starts
            torch.use_deterministic_algorithms(True)
        self._launch = machine.launch()
        self.rank, self.world = self._launch.rank, self._launch.world
        check_batches(config, self.world)
        self.device = self._device(config.device)
        self._control: dist.ProcessGroup | None = None
        self._began = self.world > 1 and not dist.is_initialized()
        if self._began:
            leave_with_parent()
            _meet("nccl" if self.device.type == "cuda" else "gloo", self.rank, self.world)
        if self.world > 1:
            # For decisions: does not wait for a GPU. The others wait for rank 0 on it; its default is half an hour.
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[assignment]

    def _device(self, asked: str) -> torch.device:
        if asked == "cuda" and self.world > 1:
            asked = f"cuda:{self._launch.local_rank}"
        try:
            # Of a tensor, with its number: torch.cuda.set_device refuses plain "cuda".
            device = torch.zeros(1, device=torch.device(asked)).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device={asked} cannot be used: {reason(error)}; pass device=cpu") from None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    @property
    def main(self) -> bool:
        """Whether this process writes records, checkpoints and logs."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        return self.rank, self.world

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        # Moving averages are brought together by modes.flush_moving: broadcasting rank 0's would lose the rest.
        with warnings.catch_warnings():  # the argument's new name is not in every torch that this runs on
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def without_exchange(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Keep the gradients of all but the last micro-batch of a step here."""
        return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Sum each value over the ranks, in float64."""
        if self.world == 1:
            return list(values)
        together = torch.stack([value.double() for value in values])
        dist.all_reduce(together)
        return list(together)

    def asked_to_stop(self) -> int | None:
        """Return the number of the signal that asked any process to stop: all hear of it at the same step."""
        number = stopping.asked()
        if self.world == 1:
            return number
        flag = torch.tensor(number or 0)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control)
        return int(flag) or None

    def check_stop(self) -> None:
        """Raise Stopped where any process was asked to stop."""
        if (number := self.asked_to_stop()) is not None:
            raise Stopped(number)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on rank 0; an empty list elsewhere."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world if self.main else []
        dist.gather_object(value, values if self.main else None, group=self._control)
        return values

    def from_main(self, value: T | None) -> T:
        """Return rank 0's value, everywhere; what the others pass is not looked at."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self._control)
        return cast(T, box[0])

    def leave(self) -> None:
        """Wait for the others, as the last call, and end the process group if it began here."""
        if self.world > 1:
            dist.barrier(group=self._control)
        if self._began:
            dist.destroy_process_group()


def _meet(backend: str, rank: int, world: int) -> None:
    """Begin the process group. UserError: the other processes are not there."""
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=MEETING))
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        found = f"WORLD_SIZE={world} RANK={rank} in the environment, but no {world} processes meet at {place}"
        remedy = f"start with torchrun, or `unset {' '.join(machine.LAUNCHER)}`"
        raise UserError(f"{found} ({reason(error)}): {remedy}") from None


def leave_with_parent() -> None:
    """Get SIGTERM when torchrun dies without a word: by SIGKILL, and by SIGUSR1, which it hands on only
    where TORCHELASTIC_SIGNALS_TO_HANDLE names it (Linux alone has this)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def end_process(code: int) -> None:
    """End a distributed run's process, at once: interpreters that shut down beside gloo's threads often abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
