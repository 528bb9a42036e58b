"""The processes of a distributed run (torchrun): this one's rank and device, and what they exchange.

A run on k processes computes what one process does. Rank r takes the images r, r + k, ... of every batch, which are
whole statistics groups (norm/groups.py); gradients are averaged over the ranks, moving averages over all their groups.
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

# How long the other ranks wait for rank 0, which re-estimates precise statistics and measures gaps alone.
CONTROL_TIMEOUT = timedelta(hours=2)
CONNECT_TIMEOUT = timedelta(
    minutes=2
)  # time limit to connect to the other processes, which may not exist without torchrun


class Ranks:
    """This process's rank, world size and device, and collectives, which do nothing in a run of one process."""

    def __init__(self, config: Config) -> None:
        """Connect to the other processes. UserError: no such device; batches that cannot be dealt out to them."""
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, set before CUDA starts
            torch.use_deterministic_algorithms(True)
        self._launch = machine.launch()
        self.rank, self.world = self._launch.rank, self._launch.world
        check_batches(config, self.world)
        self.device = self._device(config.device)
        self._control: dist.ProcessGroup | None = None
        self._began = self.world > 1 and not dist.is_initialized()
        if self._began:
            leave_with_parent()
            _init_process_group("nccl" if self.device.type == "cuda" else "gloo", self.rank, self.world)
        if self.world > 1:
            # A group on the CPU, so that decisions need not wait for the GPU. The others wait for rank 0 in it, longer
            # than the default timeout of half an hour.
            self._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)  # type: ignore[assignment]

    def _device(self, asked: str) -> torch.device:
        if asked == "cuda" and self.world > 1:
            asked = f"cuda:{self._launch.local_rank}"
        try:
            # A tensor's device has a number, which torch.cuda.set_device needs: it refuses plain "cuda".
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
        # modes.flush_moving averages the moving averages over ranks; broadcasting rank 0's would lose the others.
        with warnings.catch_warnings():  # broadcast_buffers is being renamed, but not every supported torch has that
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def without_exchange(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are not exchanged, or, for a step's last micro-batch, are exchanged."""
        return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Sum each value over the ranks, in float64."""
        if self.world == 1:
            return list(values)
        together = torch.stack([value.double() for value in values])
        dist.all_reduce(together)
        return list(together)

    def asked_to_stop(self) -> int | None:
        """Return the number of a signal that asked any process to stop, or None. All ranks call it at the same step and
        get the same."""
        number = stopping.asked()
        if self.world == 1:
            return number
        flag = torch.tensor(number or 0)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control)
        return int(flag) or None

    def check_stop(self) -> None:
        """Raise Stopped if any process was asked to stop. All ranks call it."""
        if (number := self.asked_to_stop()) is not None:
            raise Stopped(number)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, an empty list on the others."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world if self.main else []
        dist.gather_object(value, values if self.main else None, group=self._control)
        return values

    def from_main(self, value: T | None) -> T:
        """Return rank 0's value on all ranks; the values that the others pass are ignored."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self._control)
        return cast(T, box[0])

    def leave(self) -> None:
        """Wait for the other ranks and end the process group if this object started it. The last call."""
        if self.world > 1:
            dist.barrier(group=self._control)
        if self._began:
            dist.destroy_process_group()


def _init_process_group(backend: str, rank: int, world: int) -> None:
    """Start the process group. UserError: the other processes do not answer."""
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=CONNECT_TIMEOUT))
        store.set_timeout(CONTROL_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=CONTROL_TIMEOUT)
    except (dist.DistError, RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        found = f"WORLD_SIZE={world} RANK={rank} in the environment, but no {world} processes meet at {place}"
        remedy = f"start with torchrun, or `unset {' '.join(machine.LAUNCHER)}`"
        raise UserError(f"{found} ({reason(error)}): {remedy}") from None


def leave_with_parent() -> None:
    """Let the kernel send this process SIGTERM when torchrun dies without passing a signal on (Linux only).

    That happens on SIGKILL, and on SIGUSR1 unless TORCHELASTIC_SIGNALS_TO_HANDLE names it.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def end_process(code: int) -> None:
    """End a distributed run's process without shutting down the interpreter, which often aborts while gloo's threads
    run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
