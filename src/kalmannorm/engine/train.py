"""Training of one run, from its configuration to its record. Read it from top to bottom."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm import data
from kalmannorm.conversion import Converted, belief_report
from kalmannorm.data.loader import Loader
from kalmannorm.engine import checkpoint
from kalmannorm.engine.evaluate import evaluate, evaluate_all, variance_gaps
from kalmannorm.engine.model import build, learning_rate, optimizer
from kalmannorm.engine.progress import Progress
from kalmannorm.errors import UserError
from kalmannorm.norm import Estimator
from kalmannorm.runs import record as records
from kalmannorm.runs.config import Config, result_part
from kalmannorm.statistics import normalizers

# One value an epoch each; accuracies in percent, of training (augmented) and of the test set under two statistics.
CURVES = ("epoch", "step", "lr", "train_loss", "train_accuracy", "moving", "online")
CHECK_EVERY = 50  # steps between looks at the loss: each one waits for the GPU


class Diverged(Exception):
    """The loss is not finite."""


def run(config: Config) -> dict[str, Any]:
    """Trains and evaluates one run; writes and returns its record. Goes on from the last checkpoint where there is one.

    A loss that is not finite ends it with a record of status "failed". UserError: impossible configuration or data.
    """
    identity = records.run_id(config)
    folder = Path(config["runs"]) / identity
    device = _device(config)
    if config["deterministic"]:
        torch.use_deterministic_algorithms(True)
    model, last = build(config)
    arrays = data.load(config["dataset"]["name"], data.root(config["data"]))
    if arrays.classes != config["dataset"]["classes"]:
        raise UserError(f"{config['dataset']['name']} has {arrays.classes} classes, not {config['dataset']['classes']}")
    _check_room(folder, model)
    train, test = loaders(config, arrays, device)

    record: dict[str, Any] = {
        "id": identity,
        "numerics": records.NUMERICS,
        "status": "done",
        "reason": None,
        "config": result_part(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": arrays.provenance | {"train_images": train.count, "test_images": test.count},
        "host": records.host(config["device"]),
    }
    model.to(device)
    small: dict[str, np.ndarray] = {}
    curves: dict[str, list[Any]] = {key: [] for key in CURVES}
    record["curves"] = curves
    progress = Progress(identity, config)
    try:
        with progress:
            seconds = _fit(config, identity, model, train, test, folder, curves, progress)
            stat_batch, epochs = config["batch"]["stat_batch"], config["budget"]["epochs"]
            record["final"] = evaluate_all(model, train, test, stat_batch, epochs)
            if normalizers(model):
                small, raw = variance_gaps(model, train, last, config["batch"]["grad_batch"], stat_batch)
                np.savez(folder / "gaps.npz", **raw)  # type: ignore[arg-type]
            record["norms"] = _describe(model, last)
    except Diverged as error:
        record |= {"status": "failed", "reason": str(error)}
        seconds = progress.seconds
    record["host"] |= {
        "seconds": round(progress.seconds, 1),
        "train_seconds": round(seconds, 1),
        "images_per_s": round(progress.images / seconds, 1) if seconds else None,
    }
    records.write(config["results"], record, small)
    return record


def loaders(config: Config, arrays: data.Arrays, device: torch.device) -> tuple[Loader, Loader]:
    """Training and test images at the budget's resolution, on the device, both under the training images' mean."""
    budget, dataset = config["budget"], config["dataset"]
    images, labels = arrays.train_images, arrays.train_labels
    if budget["subset"] is not None:
        chosen = data.class_balanced_subset(labels, budget["subset"])
        images, labels = images[chosen], labels[chosen]
    size = budget["size"]
    pad = max(1, round(dataset["pad"] * size / 32))  # the released 4 is for 32 pixels
    train = Loader(
        data.resize(images, size),
        labels,
        batch=config["batch"]["grad_batch"],
        device=device,
        pad=pad,
        flip=dataset["flip"],
        seed=config["seed"],
    )
    test = Loader(data.resize(arrays.test_images, size), arrays.test_labels, batch=1, device=device, mean=train.mean)
    return train, test


def _fit(
    config: Config,
    identity: str,
    model: Converted,
    train: Loader,
    test: Loader,
    folder: Path,
    curves: dict[str, list[Any]],
    progress: Progress,
) -> float:
    """The training loop, over the epochs. Fills the curves; returns the seconds of training alone."""
    stat_batch = config["batch"]["stat_batch"]
    optim = optimizer(model, config["schedule"])
    seconds, first = 0.0, 0
    state = checkpoint.load(folder, identity)
    if state is not None:
        model.load_state_dict(state["model"])
        optim.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        curves.update(state["curves"])
        seconds, first = state["seconds"], len(curves["epoch"])
    progress.begin(first, train.steps_per_epoch, train.batch, folder)
    forward = torch.compile(model) if config["compile"] else model

    for epoch in range(first, config["budget"]["epochs"]):
        began = time.perf_counter()
        trained = train_epoch(config, model, forward, optim, train, epoch, progress)
        seconds += time.perf_counter() - began
        for key, value in trained.items():
            curves[key].append(value)
        for kind in ("moving", "online"):
            curves[kind].append(evaluate(model, test, kind, stat_batch)["accuracy"])
        checkpoint.save(
            folder,
            {
                "id": identity,
                "model": model.state_dict(),
                "optimizer": optim.state_dict(),
                "rng": torch.get_rng_state(),
                "curves": curves,
                "seconds": seconds,
            },
        )
        progress.epoch(curves)
    return seconds


def train_epoch(
    config: Config,
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    optim: torch.optim.Optimizer,
    train: Loader,
    epoch: int,
    progress: Progress,
) -> dict[str, float]:
    """One epoch (from 0) of `model`, run by `forward`, which is the model or its compiled form. Raises Diverged."""
    schedule, budget, steps = config["schedule"], config["budget"], train.steps_per_epoch
    total = steps * budget["epochs"]
    autocast = torch.autocast(train.device.type, torch.bfloat16, enabled=config["precision"] == "bf16")
    model.train()
    loss_sum = torch.zeros((), device=train.device)
    correct = torch.zeros((), dtype=torch.int64, device=train.device)
    rate = 0.0
    for i, (x, labels) in enumerate(train.epoch(epoch)):
        rate = learning_rate(epoch * steps + i, total, schedule, budget["of_epochs"])
        for group in optim.param_groups:
            group["lr"] = rate
        with autocast:
            logits = forward(x)
            loss = F.cross_entropy(logits.float(), labels)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        optim.step()
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == labels).sum()
        if (i + 1) % CHECK_EVERY == 0 or i + 1 == steps:
            mean_loss = loss_sum.item() / (i + 1)
            if not math.isfinite(mean_loss):
                raise Diverged(f"the loss is not finite in epoch {epoch + 1}, step {i + 1} of {steps}")
            progress.step(epoch, i + 1, mean_loss, 100 * correct.item() / ((i + 1) * train.batch))
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * steps,
        "lr": rate,
        "train_loss": loss_sum.item() / steps,
        "train_accuracy": 100 * correct.item() / (steps * train.batch),
    }


def _describe(model: nn.Module, last: tuple[str, ...]) -> dict[str, Any]:
    """The normalizers after training: order, gains, which had a prior."""
    return {
        "order": list(normalizers(model)),
        "last": list(last),
        "gains": {name: m.gain_value for name, m in model.named_modules() if isinstance(m, Estimator)},
        "beliefs": belief_report(model),
    }


def _device(config: Config) -> torch.device:
    try:
        device = torch.device(config["device"])
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={config['device']} cannot be used: {reason}; pass device=cpu") from None
    return device


def _check_room(folder: Path, model: nn.Module) -> None:
    """Permission and room for a checkpoint (weights and momentum, old and new at once), before the work is done."""
    records.write_atomically(folder / ".probe", b"")
    (folder / ".probe").unlink()
    needed = 4 * sum(p.numel() * p.element_size() for p in model.parameters()) + 2**26
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed; pass runs=FOLDER")
