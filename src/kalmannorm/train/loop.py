"""Training of one run, from its configuration to its record. Read it from top to bottom."""

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm.conversion import belief_report
from kalmannorm.data.batches import Batches
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import Config
from kalmannorm.files import check_room
from kalmannorm.norm import Estimator, PopulationNorm, SparseSwitchableNorm, SwitchableNorm
from kalmannorm.norm.modes import finish_gradients, flush_moving, normalizers, place_batch, set_progress, spread_batches
from kalmannorm.train.evaluate import arithmetic, evaluate, precise, under_both, variance_gaps
from kalmannorm.train.first_steps import FirstSteps
from kalmannorm.train.initialize import initialize, measure_input
from kalmannorm.train.loaders import loaders, open_data, recoloured
from kalmannorm.train.model import build, learning_rate, optimizer
from kalmannorm.train.progress import Progress
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.refresh_weights import refresh_weights
from kalmannorm.train.state import Session, StopRequest

NEAR_CHANCE = 1.2  # times the accuracy of guessing
CHECK_EVERY = 50  # steps between looks at the loss: each one waits for the GPU


class Diverged(Exception):
    """The loss is not finite."""


def run(config: Config) -> records.Record:
    """Trains and evaluates one run; writes and returns its record. Goes on from the last checkpoint where there is one.

    In a distributed run every process calls it and gets the record; rank 0 writes. A loss that is not finite ends it
    with a record of status "failed". UserError: impossible configuration or data. Stopped: a signal.
    """
    ranks = Ranks(config)
    identity = records.run_id(config)
    folder = Path(config["runs"]) / identity
    model, last = build(config)
    source = open_data(config, ranks)
    if ranks.main:
        check_room(folder, checkpoint_bytes(model))
    train, test = loaders(config, source, ranks)

    sizes = {"train_images": train.count, "test_images": test.count}
    parameters = sum(p.numel() for p in model.parameters())
    record = records.begin(config, parameters, source.provenance | sizes, str(ranks.device), ranks.world)
    model.to(ranks.device)
    measure_input(model, train, ranks)
    session = Session(identity, folder, model, optimizer(model, config["schedule"]), ranks)
    record["curves"] = session.curves
    figures: dict[str, np.ndarray] = {}
    only_first = "stop_after" in config["budget"]
    with Progress(identity, config, quiet=not ranks.main) as progress, StopRequest(ranks) as stop:
        try:
            if only_first:
                with FirstSteps(model) as watched:
                    last_evaluation = _fit(config, session, train, test, progress, stop)
                figures = watched.arrays()
            else:
                last_evaluation = _fit(config, session, train, test, progress, stop)
            stat_batch, epochs = config["batch"]["stat_batch"], config["budget"]["epochs"]
            patience = config["budget"]["stop_at_chance"]
            if session.epoch < epochs and not only_first:
                record["reason"] = f"at chance for {patience} epochs: ended after {session.epoch} of {epochs}"
            with arithmetic(config, ranks.device):
                record["final"] = last_evaluation or _evaluate_both(model, test, stat_batch, ranks, stop)
                record["norms"] = _describe(model, last)
                if ranks.main:
                    if ranks.world > 1:
                        train, test = loaders(config, source, ranks, whole=True)
                    record["final"]["precise"] = precise(model, train, test, stat_batch, epochs)
                    for name, changed in recoloured(config, source, train, ranks.device).items():
                        record["final"][name] = evaluate(model, changed, "moving", stat_batch)
                    if normalizers(model) and not only_first:
                        grad_batch, part = config["batch"]["grad_batch"], config["dataset"].get("gap_images")
                        figures, raw = variance_gaps(model, train, last, grad_batch, stat_batch, part)
                        np.savez(folder / "gaps.npz", **raw)  # type: ignore[arg-type]
        except Diverged as error:
            record |= {"status": "failed", "reason": str(error)}
        images = (session.epoch * train.steps_per_epoch + session.step) * train.batch
        records.add_speed(record, images, session.seconds, progress.seconds)
    if ranks.main:
        records.write(config["results"], record, figures)
    record = ranks.from_main(record)
    ranks.leave()
    return record


def _fit(
    config: Config, session: Session, train: Batches, test: Batches, progress: Progress, stop: StopRequest
) -> dict[str, Any] | None:
    """The training, from where the last checkpoint left it; the evaluation after its last epoch, None where that was
    over already. Raises Diverged and Stopped."""
    session.restore()
    if session.epoch == session.step == 0:
        initialize(session.model, train)
    epochs, stat_batch, ranks = config["budget"]["epochs"], config["batch"]["stat_batch"], session.ranks
    steps = train.steps_per_epoch
    progress.begin(session.epoch * steps + session.step, epochs * steps, train.batch, session.folder)
    forward = ranks.wrap(session.model)
    if config["compile"]:
        torch.compiler.reset()  # a worker lives on from run to run, and the compiler gives up after a few models
        forward = torch.compile(forward, dynamic=False)  # type: ignore[assignment]
    spread_batches(session.model, ranks.world * config["accumulate"] > 1)

    found = None
    while session.epoch < epochs and not _is_over(session.curves["train_accuracy"], config):
        trained = train_epoch(config, session, forward, train, progress, stop)
        session.save()
        set_progress(session.model, (session.epoch + 1) / epochs)
        with arithmetic(config, ranks.device):
            found = _evaluate_both(session.model, test, stat_batch, ranks, stop)
        trained |= {kind: one["accuracy"] for kind, one in found.items()}
        for key, value in trained.items():
            session.curves[key].append(value)
        session.begin_epoch(session.epoch + 1)
        session.save()
        progress.epoch(session.curves)
    return found


def _is_over(train_accuracy: list[float], config: Config) -> bool:
    """Say whether a run ends early: the budget's first steps are done, or its last `stop_at_chance` epochs after the
    warm-up have learned next to nothing."""
    budget = config["budget"]
    if "stop_after" in budget:
        return bool(train_accuracy)
    warm = math.ceil(budget["warmup"] or 0)
    last = train_accuracy[warm:][-budget["stop_at_chance"] :] if budget["stop_at_chance"] else []
    chance = 100 / config["dataset"]["classes"]
    return len(last) == budget["stop_at_chance"] and max(last) < NEAR_CHANCE * chance


def _evaluate_both(
    model: nn.Module, test: Batches, stat_batch: int | None, ranks: Ranks, stop: StopRequest
) -> dict[str, dict[str, Any]]:
    def one(statistics: str) -> dict[str, Any]:
        found = evaluate(model, test, statistics, stat_batch, ranks)
        stop.check()
        return found

    return under_both(model, one)


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """Choose that of the training images. What a CPU's compiler makes of channels_last takes 3/4 of the time."""
    return torch.channels_last if config["compile"] and device.type == "cpu" else torch.preserve_format


def train_epoch(
    config: Config, session: Session, forward: nn.Module, train: Batches, progress: Progress, stop: StopRequest
) -> dict[str, float]:
    """The rest of the session's epoch; `forward` is the model, wrapped and compiled. Returns the curves' new values."""
    schedule, budget, steps = config["schedule"], config["budget"], train.steps_per_epoch
    total = steps * budget["epochs"]
    save_every = max(1, round(config["checkpoint_every"] * total))
    autocast = arithmetic(config, train.device)
    layout = memory_format(config, train.device)
    part_of_run = None if budget["warmup"] is None else budget["warmup"] / budget["epochs"]
    session.model.train()
    began, before = time.perf_counter(), session.seconds
    end = min(steps, budget.get("stop_after", steps))
    for x, labels in islice(train.epoch(session.epoch, session.step), end - session.step):
        done = session.epoch * steps + session.step
        for group in session.optimizer.param_groups:
            rate = learning_rate(done, total, schedule, part_of_run, config["batch"]["grad_batch"])
            group["lr"] = rate * group.get("part_of_rate", 1)
        set_progress(session.model, done / total)
        refresh_weights(config, session, train, done)
        session.optimizer.zero_grad(set_to_none=True)
        x = x.to(memory_format=layout)
        _forward_backward(session, forward, autocast, x, labels, config["accumulate"], done)
        finish_gradients(session.model)
        session.optimizer.step()
        session.step += 1
        session.seconds = before + time.perf_counter() - began
        if session.step % CHECK_EVERY == 0 or session.step == end:
            loss_so_far, accuracy = session.means(train.batch)
            if not math.isfinite(loss_so_far):
                raise Diverged(f"the loss is not finite in epoch {session.epoch + 1}, step {session.step} of {steps}")
            progress.step(done + 1, loss_so_far, accuracy)
        if (stopping := stop.asked()) or ((done + 1) % save_every == 0 and session.step < steps):
            session.save()
            if stopping:
                stop.check()
    loss_so_far, accuracy = session.means(train.batch)
    return {
        "epoch": session.epoch + 1,
        "step": (session.epoch + 1) * steps,
        "lr": session.optimizer.param_groups[0]["lr"],
        "train_loss": loss_so_far,
        "train_accuracy": accuracy,
    }


def _forward_backward(
    session: Session, forward: nn.Module, autocast: torch.autocast, x: Tensor, labels: Tensor, parts: int, step: int
) -> None:
    """Gradients of one step."""
    for part in micro_batches(session, forward, parts, step):
        with autocast:
            logits = forward(x[part::parts])
            loss = F.cross_entropy(logits.float(), labels[part::parts]) / parts
        loss.backward()
        session.loss_sum += loss.detach()
        session.correct += (logits.detach().argmax(1) == labels[part::parts]).sum()


def micro_batches(session: Session, forward: nn.Module, parts: int, step: int) -> Iterator[int]:
    """The number of each micro-batch, when it is to run forward and backward: the i-th is the images i, i + parts, ...,
    dealt out interleaved as they are to the processes. `forward`: the wrapped model; gradients are exchanged once."""
    ranks = session.ranks
    for part in range(parts):
        if ranks.world * parts > 1:
            place_batch(session.model, step, ranks.rank + ranks.world * part, ranks.world * parts)
        with ranks.without_exchange(forward, last=part == parts - 1):
            yield part
    if ranks.world * parts > 1:
        flush_moving(session.model)


def _describe(model: nn.Module, last: tuple[str, ...]) -> dict[str, Any]:
    """The normalizers after training: order, gains, which had a prior; and where there are any, the weights of SN, the
    choices of SSN with the part of the training after which each was made, and gamma decay's mean coefficient with the
    number of steps at which it was held at the cap."""
    gains = {name: m.gain_value for name, m in model.named_modules() if isinstance(m, Estimator)}
    mixture = {name: m.weights for name, m in model.named_modules() if isinstance(m, SwitchableNorm)}
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseSwitchableNorm)}
    choices = {name: {"chosen": m.chosen, "at": m.chosen_at.tolist()} for name, m in sparse.items()}
    decays = {name: m.decay for name, m in model.named_modules() if isinstance(m, PopulationNorm) and m.decay}
    decay = {name: {"zeta": d.zeta.mean().item(), "capped": int(d.capped)} for name, d in decays.items()}
    some = {"mixture": mixture, "choices": choices, "gamma_decay": decay}
    return {
        "order": list(normalizers(model)) or list(gains),  # GKN's have no batch statistics
        "last": list(last),
        "gains": gains,
        "beliefs": belief_report(model),
    } | {key: values for key, values in some.items() if values}


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the room that checkpoints take: weights and momentum, old and new at once."""
    return 4 * sum(p.numel() * p.element_size() for p in model.parameters()) + 2**26
