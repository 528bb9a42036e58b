"""Train one run, from its configuration to its record, whatever its task. Read this file from top to bottom."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kalmannorm.conversion.compiled import prepare_compiler
from kalmannorm.errors import UserError, reason
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import Config
from kalmannorm.files import check_free_space, clear_unfinished
from kalmannorm.machine import keep_freed_memory
from kalmannorm.norm.modes import finish_gradients, flush_moving, place_batch, set_progress, spread_batches
from kalmannorm.stopping import finishing, listening
from kalmannorm.train.model import optimizer
from kalmannorm.train.progress import Progress
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session
from kalmannorm.train.task import Arrays, Task, arithmetic

CHECK_EVERY = 50  # steps between two checks of the loss: each check waits for the GPU


class Diverged(Exception):
    """The loss is not finite."""


def run(config: Config) -> records.Record:
    """Train and evaluate one run; write and return its record. If the run has a checkpoint, resume from it.

    In a distributed run every process calls this and gets the record; rank 0 writes it. If the loss is not finite, the
    run ends with a record of status "failed". UserError: impossible configuration or data. Stopped: a signal.
    """
    ranks = Ranks(config)
    # A process that stopped at once would leave the others waiting for it: with several processes, a signal only takes
    # effect where all of them check for it (`ranks.check_stop`).
    with finishing() if ranks.world > 1 else nullcontext():
        return _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> records.Record:
    identity = records.run_id(config)
    folder = Path(config.runs) / identity
    if ranks.device.type == "cpu":
        keep_freed_memory()
    task = open_task(config, ranks)
    if ranks.main:
        weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
        check_free_space(folder, 4 * weights + 2**26)  # two checkpoints, each with weights and momentum
        file = records.path(config.results, identity)
        clear_unfinished(file)
        clear_unfinished(file.with_suffix(".npz"))
    task.load()
    parameters = sum(p.numel() for p in task.model.parameters())
    record = records.begin(config, parameters, task.provenance, str(ranks.device), ranks.world)
    session = open_session(identity, folder, task)
    record["curves"] = session.curves
    arrays: Arrays = {}
    with listening(), Progress(identity, config, quiet=not ranks.main) as progress:
        try:
            session.restore()
            task.begin(session, record)
            with task.watching():
                evaluated = _fit(task, session, progress)
            spread_batches(task.model, False)
            with arithmetic(config, ranks.device):
                record["final"] = evaluated or task.evaluate()
                arrays = task.finish(record, session)
        except Diverged as error:
            record["status"], record["reason"] = "failed", str(error)
        steps = min(task.end, session.epoch * task.train.steps_per_epoch + session.step)
        records.add_speed(record, steps * task.train.batch, session.seconds, progress.seconds)
    if ranks.main:
        with finishing():
            records.write(config.results, record, arrays)
    record = ranks.from_main(record)
    ranks.leave()
    return record


def open_task(config: Config, ranks: Ranks) -> Task:
    """Return the task that the data set belongs to, with its model built and its data opened. UserError: impossible
    configuration or data."""
    if config.task == "detection":
        from kalmannorm.train.task_detection import Detection

        return Detection(config, ranks)
    if config.task == "segmentation":
        from kalmannorm.train.task_segmentation import Segmentation

        return Segmentation(config, ranks)
    from kalmannorm.train.task_classification import Classification

    return Classification(config, ranks)


def open_session(identity: str, folder: Path, task: Task) -> Session:
    """Return the state before the first step. `identity`: the run's id; `folder`: where its checkpoints go."""
    curves: records.Curves = {key: [] for key in ("epoch", "step", "lr", *task.curves)}
    schedule = task.config.schedule
    sgd = optimizer(task.model, momentum=schedule.momentum, weight_decay=schedule.weight_decay)
    return Session(identity, folder, task.model, sgd, task.ranks, task.zero_sums, curves)


def _fit(task: Task, session: Session, progress: Progress) -> dict[str, records.Evaluation] | None:
    """Train from the session's step to the end of the run. Return the evaluation after the last epoch, or None if no
    epoch was left to train or the task does not evaluate epochs. Raises Diverged and Stopped."""
    config, ranks, steps = task.config, task.ranks, task.train.steps_per_epoch
    first = session.epoch * steps + session.step
    progress.begin(first, task.end, task.train.batch, session.folder, session.curves)
    forward = ranks.wrap(session.model)
    if config.compile:
        prepare_compiler()
        torch.compiler.reset()  # a worker process trains many runs, and the compiler gives up after a few models
        forward = torch.compile(forward, dynamic=False)  # type: ignore[assignment]
    spread_batches(session.model, ranks.world * config.accumulate > 1)

    evaluated = None
    while session.epoch * steps < task.end and not task.ends_early(session.curves):
        with finishing():
            values = train_epoch(task, session, forward, progress, first)
            if task.evaluates_epochs or ranks.asked_to_stop():
                session.save()
        if task.evaluates_epochs:
            set_progress(session.model, values["step"] / task.total)
            with arithmetic(config, ranks.device):
                evaluated = task.evaluate()
            for kind, found in evaluated.items():
                reached = found[task.metric]
                assert isinstance(reached, float)
                values[kind] = reached
        with finishing():
            for key, value in values.items():
                session.curves[key].append(value)
            session.begin_epoch(session.epoch + 1)
            if task.evaluates_epochs or _due(config, values["step"], task.total) or ranks.asked_to_stop():
                session.save()
            progress.epoch(session.curves)
    return evaluated


def train_epoch(
    task: Task, session: Session, forward: nn.Module, progress: Progress, first: int = 0
) -> dict[str, float]:
    """Train to the end of the session's epoch, or of the run. Return the epoch's values of the curves.

    `forward`: the model, wrapped and compiled. `first`: the step at which this process began.
    """
    config, ranks, total = task.config, task.ranks, task.total
    before_epoch = session.epoch * task.train.steps_per_epoch
    last = min(task.train.steps_per_epoch, task.end - before_epoch)
    session.model.train()
    began, before = time.perf_counter(), session.seconds
    for batch in islice(task.train.epoch(session.epoch, session.step), last - session.step):
        done = before_epoch + session.step
        for group in session.optimizer.param_groups:
            group["lr"] = task.rate(done) * group.get("part_of_rate", 1)
        set_progress(session.model, done / total)
        task.before_step(session, done)
        session.optimizer.zero_grad(set_to_none=True)
        try:
            _forward_backward(task, session, forward, batch, done)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            remedy = "repair the compiler, or pass compile=false"
            raise UserError(f"compile = true: {reason(error)}; {remedy}") from None
        if config.compile and done == first:
            _check_compiled(session.model)
        finish_gradients(session.model)
        session.optimizer.step()
        session.step += 1
        session.seconds = before + time.perf_counter() - began
        if session.step % CHECK_EVERY == 0 or session.step == last:
            means = task.means(session.totals(), session.step)
            if not math.isfinite(means["train_loss"]):
                raise Diverged(f"the loss is not finite in epoch {session.epoch + 1}, step {session.step} of {last}")
            progress.step(done + 1, means["train_loss"], means.get("train_accuracy"))
        if (stopping := ranks.asked_to_stop()) or (_due(config, done + 1, total) and session.step < last):
            session.save()
            if stopping:
                ranks.check_stop()
    lr = session.optimizer.param_groups[0]["lr"]
    place = {"epoch": session.epoch + 1, "step": before_epoch + session.step, "lr": lr}
    return place | task.means(session.totals(), session.step)


def _check_compiled(model: nn.Module) -> None:
    """Raise UserError for a gradient that is not finite in the first step of this process.

    A network that diverges does so later. One machine's compiler was seen to leave transposed bfloat16 maps unwritten,
    with whatever was in memory before; the record would have blamed the normalizer for the failure.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            remedy = "this machine's compiler may be at fault: pass compile=false"
            raise UserError(f"compile = true: the gradient of {name} is not finite in the first step; {remedy}")


def _forward_backward(task: Task, session: Session, forward: nn.Module, batch: Any, step: int) -> None:
    """Compute the gradients of one step, summed over its micro-batches."""
    parts = task.config.accumulate
    for part in micro_batches(session, forward, parts, step):
        with arithmetic(task.config, task.ranks.device):
            loss, sums = task.loss(forward, batch, part, parts)
        loss.backward()
        session.add(sums)


def micro_batches(session: Session, forward: nn.Module, parts: int, step: int) -> Iterator[int]:
    """Yield the number of each micro-batch, in the context in which it has to run forward and backward.

    Micro-batch i holds the images i, i + parts, ... of the process's batch, interleaved as images are over processes.
    `forward`: the wrapped model, whose gradients are exchanged between processes at the last micro-batch only.
    """
    ranks = session.ranks
    for part in range(parts):
        if ranks.world * parts > 1:
            place_batch(session.model, step, ranks.rank + ranks.world * part, ranks.world * parts)
        with ranks.without_exchange(forward, last=part == parts - 1):
            yield part
    if ranks.world * parts > 1:
        flush_moving(session.model)


def _due(config: Config, done: float, total: int) -> bool:
    """Say whether a checkpoint is due after `done` steps."""
    return done % max(1, round(config.checkpoint_every * total)) == 0 or done == total
