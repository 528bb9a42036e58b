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
from kalmannorm.conversion import belief_report
from kalmannorm.data.loader import Loader
from kalmannorm.engine.evaluate import evaluate, evaluate_all, variance_gaps
from kalmannorm.engine.model import build, learning_rate, optimizer
from kalmannorm.engine.progress import Progress
from kalmannorm.engine.session import Session, StopRequest
from kalmannorm.errors import UserError
from kalmannorm.norm import Estimator
from kalmannorm.runs import record as records
from kalmannorm.runs.config import Config, result_part
from kalmannorm.statistics import normalizers

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
    session = Session(identity, folder, model, optimizer(model, config["schedule"]), device)
    record["curves"] = session.curves
    arrays_of_figures: dict[str, np.ndarray] = {}
    with Progress(identity, config) as progress, StopRequest() as stop:
        try:
            _fit(config, session, train, test, progress, stop)
            stat_batch, epochs = config["batch"]["stat_batch"], config["budget"]["epochs"]
            record["final"] = evaluate_all(model, train, test, stat_batch, epochs)
            stop.check()
            if normalizers(model):
                arrays_of_figures, raw = variance_gaps(model, train, last, config["batch"]["grad_batch"], stat_batch)
                np.savez(folder / "gaps.npz", **raw)  # type: ignore[arg-type]
            record["norms"] = _describe(model, last)
        except Diverged as error:
            record |= {"status": "failed", "reason": str(error)}
        images = (session.epoch * train.steps_per_epoch + session.step) * train.batch
        record["host"] |= {
            "seconds": round(progress.seconds, 1),
            "train_seconds": round(session.seconds, 1),
            "images_per_s": round(images / session.seconds, 1) if session.seconds else None,
        }
    records.write(config["results"], record, arrays_of_figures)
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


def _fit(config: Config, session: Session, train: Loader, test: Loader, progress: Progress, stop: StopRequest) -> None:
    """The training, from where the last checkpoint left it. Raises Diverged and Stopped."""
    session.restore()
    epochs, stat_batch = config["budget"]["epochs"], config["batch"]["stat_batch"]
    progress.begin(
        session.epoch * train.steps_per_epoch + session.step, train.steps_per_epoch, train.batch, session.folder
    )
    forward = torch.compile(session.model) if config["compile"] else session.model

    while session.epoch < epochs:
        trained = train_epoch(config, session, forward, train, progress, stop)
        session.save()
        for kind in ("moving", "online"):
            trained[kind] = evaluate(session.model, test, kind, stat_batch)["accuracy"]
            stop.check()
        for key, value in trained.items():
            session.curves[key].append(value)
        session.begin_epoch(session.epoch + 1)
        session.save()
        progress.epoch(session.curves)


def train_epoch(
    config: Config,
    session: Session,
    forward: Callable[[Tensor], Tensor],
    train: Loader,
    progress: Progress,
    stop: StopRequest,
) -> dict[str, float]:
    """The rest of the session's epoch; `forward` is the model or its compiled form. Returns the curves' new values."""
    schedule, budget, steps = config["schedule"], config["budget"], train.steps_per_epoch
    total = steps * budget["epochs"]
    save_every = max(1, round(config["checkpoint_every"] * total))
    autocast = torch.autocast(train.device.type, torch.bfloat16, enabled=config["precision"] == "bf16")
    session.model.train()
    began, before = time.perf_counter(), session.seconds
    for x, labels in train.epoch(session.epoch, session.step):
        done = session.epoch * steps + session.step
        for group in session.optimizer.param_groups:
            group["lr"] = learning_rate(done, total, schedule, budget["of_epochs"])
        with autocast:
            logits = forward(x)
            loss = F.cross_entropy(logits.float(), labels)
        session.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        session.optimizer.step()
        session.loss_sum += loss.detach()
        session.correct += (logits.detach().argmax(1) == labels).sum()
        session.step += 1
        session.seconds = before + time.perf_counter() - began
        if session.step % CHECK_EVERY == 0 or session.step == steps:
            loss_so_far, accuracy = _means(session, train.batch)
            if not math.isfinite(loss_so_far):
                raise Diverged(f"the loss is not finite in epoch {session.epoch + 1}, step {session.step} of {steps}")
            progress.step(done + 1, loss_so_far, accuracy)
        if stop.number is not None or ((done + 1) % save_every == 0 and session.step < steps):
            session.save()
            stop.check()
    loss_so_far, accuracy = _means(session, train.batch)
    return {
        "epoch": session.epoch + 1,
        "step": (session.epoch + 1) * steps,
        "lr": session.optimizer.param_groups[0]["lr"],
        "train_loss": loss_so_far,
        "train_accuracy": accuracy,
    }


def _means(session: Session, batch: int) -> tuple[float, float]:
    """Loss and training accuracy (percent) over the steps of the epoch so far."""
    return session.loss_sum.item() / session.step, 100 * session.correct.item() / (session.step * batch)


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
