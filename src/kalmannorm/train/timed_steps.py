"""Measure speed by training steps on one fixed batch, two networks alternating (Table 3, benchmarks/)."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm.conversion.compiled import prepare_compiler
from kalmannorm.machine import keep_freed_memory
from kalmannorm.train.model import optimizer

GRAD_BATCH = 128
RECIPE = {"momentum": 0.9, "weight_decay": 2e-4}
WARM_UP = 3  # steps not timed, for compilation, allocation and caches

Step = Callable[[], None]
Pairs = list[tuple[float, float]]  # seconds of neighbouring steps: this, against


def alternate(this: Step, against: Step, seconds: float, device: torch.device) -> Pairs:
    """Time pairs of one step each, for about `seconds` and at least 5 pairs; the order within pairs alternates."""

    def timed(step: Step) -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(WARM_UP):
        timed(this), timed(against)
    pairs: Pairs = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 5:
        if len(pairs) % 2:
            second = timed(against)
            pairs.append((timed(this), second))
        else:
            pairs.append((timed(this), timed(against)))
    return pairs


def training_step(
    model: nn.Module,
    device: torch.device,
    batch: tuple[Tensor, Tensor] | None = None,
    *,
    compiled: bool = False,
    precision: str = "fp32",
) -> Step:
    """Return a function that does one training step as the harness does, always on the same batch.

    `batch`: images and labels; None: noise of CIFAR's size. `precision`: fp32 or bf16.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).train()
    x, labels = (part.to(device) for part in batch or synthetic_batch())
    optim = optimizer(model, **RECIPE)
    for group in optim.param_groups:
        group["lr"] = 1e-3
    if compiled:
        prepare_compiler()
    run = torch.compile(model, dynamic=False) if compiled else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        optim.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(run(x).float(), labels)
        loss.backward()
        optim.step()

    return step


def synthetic_batch(images: int = GRAD_BATCH, size: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Return noise [images, 3, size, size] and labels [images], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=generator)
    return x, torch.randint(classes, (images,), generator=generator)
