"""Detection, the second task beside classification: training of one run, from its configuration to its record.

As train.py, with the same checkpoints, signals, records and ranks; read that first. An epoch is a pass over the images,
the run may end within one (`dataset.steps`), and detectors are evaluated once, at the end.
"""

import copy
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm import data
from kalmannorm.data import coco
from kalmannorm.data.batches import fixed_order
from kalmannorm.data.coco import Batch, Coco, TrainingBatches
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import Config
from kalmannorm.files import check_room
from kalmannorm.models.detection.parts import LOSSES
from kalmannorm.norm.modes import finish_gradients, spread_batches
from kalmannorm.train import detector
from kalmannorm.train.average_precision import evaluate
from kalmannorm.train.detection_picture import draw_detections
from kalmannorm.train.evaluate import arithmetic, under_both
from kalmannorm.train.loop import CHECK_EVERY, Diverged, checkpoint_bytes, micro_batches
from kalmannorm.train.model import optimizer
from kalmannorm.train.progress import Progress
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session, StopRequest

# One value an epoch each; train_loss is the sum of the others.
CURVES = ("epoch", "step", "lr", "train_loss", *LOSSES)
SHOWN = 4  # images in a picture


def run(config: Config) -> records.Record:
    """Trains and evaluates one run; writes and returns its record, as train.run does.

    record["final"][kind] holds AP in percent (average_precision.NAMES for box and mask) under moving and online
    statistics; precise ones are not offered: the head's regions differ between training and evaluation.
    record["weights"] says where the weights, and a frozen normalizer's constants, come from.
    """
    ranks = Ranks(config)
    identity = records.run_id(config)
    folder = Path(config["runs"]) / identity
    model = detector.build(config)
    dataset = config["dataset"]
    images = coco.load(dataset["name"], data.root(config["data"]), dataset["classes"])
    if ranks.main:
        check_room(folder, checkpoint_bytes(model))
    batches = training_batches(config, images, ranks)

    sizes = {"train_images": batches.count, "test_images": len(images.test.ids)}
    parameters = sum(p.numel() for p in model.parameters())
    record = records.begin(config, parameters, images.provenance | sizes, str(ranks.device), ranks.world)
    origin = "ImageNet weights from a file" if config["arch"]["pretrained"] else "trained from scratch"
    record["weights"] = {"origin": origin, "sha256": config["arch"]["pretrained"]}
    model.to(ranks.device)
    curves: dict[str, list[Any]] = {key: [] for key in CURVES}
    session = Session(identity, folder, model, optimizer(model, config["schedule"]), ranks, curves=curves)
    record["curves"] = session.curves
    with Progress(identity, config, quiet=not ranks.main) as progress, StopRequest(ranks) as stop:
        try:
            session.restore()
            _begin(config, session, batches, record["weights"])
            _fit(config, session, batches, progress, stop)
            record["final"] = evaluate_all(config, model, images, ranks)
            stop.check()
            seen = coco.choose(batches.positions, min(dataset["train_images_evaluated"], batches.count))
            if seen:
                record["final_on_training_images"] = evaluate(
                    model, images.train, images.labels, seen, "moving", None, ranks
                )
            record["norms"] = detector.describe(model)
            if ranks.main:
                shown = fixed_order(len(images.test.ids))[:SHOWN].tolist()
                draw_detections(model, images.test, images.labels, shown, ranks.device, folder / "detections.png")
                if seen:
                    file = folder / "detections-training.png"
                    draw_detections(model, images.train, images.labels, seen[:SHOWN], ranks.device, file)
        except Diverged as error:
            record |= {"status": "failed", "reason": str(error)}
        trained = (session.epoch * batches.steps_per_epoch + session.step) * batches.batch
        records.add_speed(record, trained, session.seconds, progress.seconds)
    if ranks.main:
        records.write(config["results"], record)
    record = ranks.from_main(record)
    ranks.leave()
    return record


def training_batches(config: Config, images: Coco, ranks: Ranks) -> TrainingBatches:
    """The training images of the budget, dealt out to the ranks."""
    asked = config["workers"]
    return TrainingBatches(
        images,
        coco.choose(images.train_images, config["budget"]["subset"]),
        batch=config["batch"]["grad_batch"],
        size=(config["budget"]["size"], config["arch"]["max_size"]),
        seed=config["seed"],
        device=ranks.device,
        shard=ranks.shard,
        # A CPU is busy with the network itself.
        workers=0 if (asked, ranks.device.type) == ("auto", "cpu") else data.workers_of(asked, ranks.world),
    )


def _begin(config: Config, session: Session, batches: TrainingBatches, weights: dict[str, Any]) -> None:
    """What a run that does not go on from a checkpoint begins with; says in `weights` where constants come from."""
    fresh = session.epoch == session.step == 0
    if config["weights"] is not None and fresh:
        detector.load_pretrained(session.model, config["weights"])
    if config["norm"]["name"] != "frozen":
        return
    if config["arch"]["pretrained"]:
        weights["constants"] = "of the file"
        return
    seen = min(detector.CONSTANTS_BATCHES, batches.steps_per_epoch) * batches.batch
    weights["constants"] = f"measured once, under the initial weights, on {seen} training images"
    if fresh:
        alone = copy.copy(batches)
        alone.shard = (0, 1)  # every rank measures on the whole batches
        detector.measure_constants(session.model, config, alone)


def total_steps(config: Config, batches: TrainingBatches) -> int:
    """Steps of the run."""
    whole = config["budget"]["epochs"] * batches.steps_per_epoch
    return min(whole, config["dataset"]["steps"] or whole)


def learning_rate(step: int, total: int, schedule: dict[str, Any], batch: int) -> float:
    """Rate of a step (from 0) of a run of `total` steps: the schedule's, scaled to that, times the batch."""
    rate = schedule["lr"] * batch / schedule["of_batch"]
    warmup = min(schedule["warmup"], total // 10)
    if step < warmup:
        return rate * (1 / 3 + 2 / 3 * step / warmup)
    return rate * 0.1 ** sum(step * schedule["of_steps"] >= drop * total for drop in schedule["drops"])


def _fit(config: Config, session: Session, batches: TrainingBatches, progress: Progress, stop: StopRequest) -> None:
    """The training, from where the last checkpoint left it. Raises Diverged and Stopped."""
    steps, total = batches.steps_per_epoch, total_steps(config, batches)
    progress.begin(session.epoch * steps + session.step, total, batches.batch, session.folder)
    forward = session.ranks.wrap(session.model)
    spread_batches(session.model, session.ranks.world * config["accumulate"] > 1)
    epochs = math.ceil(total / steps)
    while len(session.curves["epoch"]) < epochs:
        trained = train_epoch(config, session, forward, batches, progress, stop)
        for key, value in trained.items():
            session.curves[key].append(value)
        if session.step == steps:
            session.begin_epoch(session.epoch + 1)
        if _due(config, trained["step"], total):
            session.save()
        progress.epoch(session.curves)
    spread_batches(session.model, False)


def train_epoch(
    config: Config,
    session: Session,
    forward: nn.Module,
    batches: TrainingBatches,
    progress: Progress,
    stop: StopRequest,
) -> dict[str, Any]:
    """The rest of the session's epoch, or of the run; `forward`: the wrapped model. Returns the curves' new values."""
    schedule, total = config["schedule"], total_steps(config, batches)
    before_epoch = session.epoch * batches.steps_per_epoch
    last = min(batches.steps_per_epoch, total - before_epoch)
    autocast = arithmetic(config, batches.device)
    session.model.train()
    began, before = time.perf_counter(), session.seconds
    for batch in islice(batches.epoch(session.epoch, session.step), last - session.step):
        rate = learning_rate(before_epoch + session.step, total, schedule, batches.batch)
        for group in session.optimizer.param_groups:
            group["lr"] = rate * group.get("part_of_rate", 1)
        session.optimizer.zero_grad(set_to_none=True)
        _forward_backward(session, forward, autocast, batch, config["accumulate"], before_epoch + session.step)
        finish_gradients(session.model)
        session.optimizer.step()
        session.step += 1
        session.seconds = before + time.perf_counter() - began
        done = before_epoch + session.step
        if session.step % CHECK_EVERY == 0 or session.step == last:
            loss = sum(_means(session).values())
            if not math.isfinite(loss):
                raise Diverged(f"the loss is not finite in epoch {session.epoch + 1}, step {session.step} of {last}")
            progress.step(done, loss)
        if (stopping := stop.asked()) or (_due(config, done, total) and session.step < last):
            session.save()
            if stopping:
                stop.check()
    means = _means(session)
    return {
        "epoch": session.epoch + 1,
        "step": before_epoch + session.step,
        "lr": session.optimizer.param_groups[0]["lr"],
        "train_loss": sum(means.values()),
        **means,
    }


def _due(config: Config, done: int, total: int) -> bool:
    """Whether a checkpoint is due after `done` steps: an epoch of a small set is too short for one of its own."""
    return done % max(1, round(config["checkpoint_every"] * total)) == 0 or done == total


def _forward_backward(
    session: Session, forward: nn.Module, autocast: torch.autocast, batch: Batch, parts: int, step: int
) -> None:
    """Gradients of one step."""
    for part in micro_batches(session, forward, parts, step):
        with autocast:
            losses: dict[str, Tensor] = forward(batch.images[part::parts], batch.targets[part::parts], batch.canvas)
        each = torch.stack([losses[name] for name in LOSSES]) / parts
        each.sum().backward()
        # The session's sum begins as one number: here it is one for each loss.
        session.loss_sum = session.loss_sum + each.detach()


def _means(session: Session) -> dict[str, float]:
    """The losses' means over the epoch's steps so far, over all ranks."""
    (sums,) = session.ranks.sum(session.loss_sum)
    values = (sums / (session.step * session.ranks.world)).tolist()
    return dict(zip(LOSSES, values, strict=True))


def evaluate_all(config: Config, model: nn.Module, images: Coco, ranks: Ranks) -> dict[str, Any]:
    """AP on all validation images under each kind of statistics; without batch statistics both are one, made once."""
    everything, stat_batch = list(range(len(images.test.ids))), config["batch"]["stat_batch"]
    return under_both(
        model, lambda kind: evaluate(model, images.test, images.labels, everything, kind, stat_batch, ranks)
    )
